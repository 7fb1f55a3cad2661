"""The tools that lrcompile is compared with: which file runs each, and what it does differently.

Both sides read this, the benchmark and the process that runs a peer, so it imports nothing of either.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """`module` of this package makes it; one that is `searched` takes a share and runs in the peers' environment.

    `edge` is what it does differently, which is where a lead of it can come from; docs/peers.md has its settings.
    """

    module: str
    edge: str
    searched: bool = True


PEERS = {
    "uniform": Peer("uniform", "spreads the loss evenly over all layers, without a look at data or device"),
    "aimet-weight-svd": Peer("aimet", "scores each ratio of each layer by the output of the whole model"),
    "aimet-spatial-svd": Peer(
        "aimet",
        "scores each ratio of each layer by the output of the whole model, and splits k × k into k × 1 and 1 × k",
    ),
    "torch-pruning": Peer(
        "pruning",
        "takes whole channels and dimensions of heads out, so that what lies between layers shrinks too and no layer "
        "is added",
    ),
    "tensorly-torch": Peer("tensorly_torch", "factorises into more than two factors, which hold fewer weights"),
    "ort-static": Peer("int8", "puts everything that it can into int8", searched=False),
    "ort-dynamic": Peer("int8", "puts everything that it can into int8", searched=False),
}
