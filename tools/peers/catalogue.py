"""The tools that lrcompile is compared with: what each is, and what it does that lrcompile does not.

Both sides read this, the benchmark and the process that runs a peer, so it imports nothing of either.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """`module` of this package makes it; one that is `searched` takes a share and runs in the peers' environment.

    `settings` are how it is used here. `edge` is what it does that lrcompile does not, which is where a lead of it
    can come from.
    """

    module: str
    settings: str
    edge: str
    searched: bool = True


PEERS = {
    "uniform": Peer(
        "uniform",
        "plain SVD of linear layers and 1 × 1 convolutions, Tucker-2 of other convolutions (tensorly); every layer "
        "keeps the same share of its weights",
        "spreads the loss over all layers, also those that a device gains little from",
    ),
    "aimet-weight-svd": Peer(
        "aimet",
        "AIMET 2.42.0 weight SVD, greedy: ten ratios a layer, scored on 32 calibration samples",
        "scores each ratio of each layer by the output of the whole model, one at a time",
    ),
    "aimet-spatial-svd": Peer(
        "aimet",
        "AIMET 2.42.0 spatial SVD, greedy: as above, convolutions only",
        "splits k × k convolutions into k × 1 and 1 × k",
    ),
    "torch-pruning": Peer(
        "pruning",
        "Torch-Pruning 1.6.1, global and isomorphic, Taylor importance on 10 calibration batches, 5 steps",
        "takes whole channels and dimensions of heads out, so that what lies between layers shrinks too and no layer "
        "is added",
    ),
    "tensorly-torch": Peer(
        "tensorly_torch",
        "tensorly-torch 0.5.0, factorized forward: Tucker of convolutions, block tensor trains of linear layers",
        "factorises into more than two factors, so that fewer weights are left at one error",
    ),
    "ort-static": Peer(
        "int8",
        "ONNX Runtime static int8, QDQ, per channel, calibrated on the same batches",
        "computes in int8, where lrcompile keeps floating point",
        searched=False,
    ),
    "ort-dynamic": Peer(
        "int8",
        "ONNX Runtime dynamic int8, per channel",
        "computes in int8, where lrcompile keeps floating point",
        searched=False,
    ),
}
