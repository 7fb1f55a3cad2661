"""ResNet-50 for three devices: `python tools/three_devices.py --out docs/cost-model.md`.

Which layers are split, and at which rank, depends on the device, as Hajimolahoseini et al. report (arXiv 2309.12412:
+15.79 % inference throughput on an Ascend 310). The weights are random, so any error is allowed: what is compared is
where it pays. The command fails if two devices get the same layers and ranks.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch

import lrcompile
from tools.published_models import MODELS
from tools.validate_profiles import put

DEVICES = ("v100", "ascend910", "ascend310")
MAX_ERROR = 0.99
START, END = "<!-- three devices: start -->", "<!-- three devices: end -->"


def solved(device: str, batch: int) -> lrcompile.Result:
    """ResNet-50 at 224², compiled for a device."""
    torch.manual_seed(0)
    make, example = MODELS["resnet50v1.5"]
    x = torch.randn(batch, *example.shape[1:])
    return lrcompile.compile(make().eval(), (x,), target=device, budget=lrcompile.Budget(max_error=MAX_ERROR))


def split_layers(result: lrcompile.Result) -> dict[str, str]:
    """What is done to each layer that is changed with loss."""
    return {r.site[0]: f"{r.pass_name} {dict(r.params)}" for r in result.plan.rewrites if not r.exact}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="put the table into this page, between its marks")
    options = parser.parse_args(arguments)
    lines = ["| batch | device | layers split | original | compiled | throughput |", "|---|---|---|---|---|---|"]
    alike = False
    for batch in options.batches:
        layers = {}
        for device in DEVICES:
            result = solved(device, batch)
            layers[device] = split_layers(result)
            ms = result.report.latency_ms
            bar = ms["sigma"] / ms["after"] * ms["speedup"]
            lines.append(
                f"| {batch} | {device} | {len(layers[device])} | {ms['before']:.2f} ms | {ms['after']:.2f} ms "
                f"| {ms['speedup'] - 1:+.1%} ± {bar:.1%} |"
            )
            print(lines[-1], flush=True)
        alike |= any(layers[a] == layers[b] for a, b in combinations(DEVICES, 2))
    if options.out:
        put(options.out, START, "\n".join(lines), END)
    return int(alike)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
