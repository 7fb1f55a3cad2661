"""Runs compiles in processes of their own, some of which are killed: `python interrupted.py FOLDER`.

The parent imports once and forks for each run. A run that is to be killed sends itself SIGKILL where a stage reports
how far it is, or after so many decompositions were kept. Prints JSON: for each moment, whether the first run was
killed, and how many decompositions the second one computed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lrcompile.planning.store import Store
from lrcompile.recovery import train
from lrcompile.session import Request, compile_files

MOMENTS = ("trace 0", "calibrate 1", "decomposed 1", "sensitivity 1", "recover 3", "emit 0")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, x: Any) -> Any:
        return self.head(self.down(self.up(x).relu()).relu())


def build() -> nn.Module:
    import torch

    torch.manual_seed(0)
    net = Net().eval()
    for layer in (net.up, net.down):
        layer.weight.data = torch.randn(256, 24) @ torch.randn(24, 256) / 80 + 0.02 * layer.weight.data
    return net


def compile_in(folder: Path, made: list[str], moment: str | None) -> None:
    """One compile, killed at a moment; `made` gets the decompositions that it computes."""
    write = Store._write

    def counted(self: Store, path: Path, *rest: Any) -> None:
        write(self, path, *rest)
        made.append(path.name)
        if moment == f"decomposed {len(made)}":
            os.kill(os.getpid(), signal.SIGKILL)

    def progress(stage: str, done: int, total: int) -> None:
        if moment == f"{stage} {done}":
            os.kill(os.getpid(), signal.SIGKILL)

    Store._write = counted  # type: ignore[method-assign]
    train.SAVED_EVERY_S = 0.0
    request = Request.of(
        model="interrupted:build", target="v100", out=str(folder / "out.onnx"), calib=str(folder.parent / "calib.npz"),
        batch=16, size="50%", plan_out=folder / "plan.json", recover=6, seed=0, measure="error", trust_pickle=False,
        inputs=(), options=("recover.rate=0.001", "recover.precision=fp32"), skip=(),
    )  # fmt: skip
    compile_files(request, progress)


def in_a_process(work: Callable[[], None]) -> int:
    """The wait status of a forked process that does some work."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(child, 0)[1]


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    for moment in (None, *MOMENTS):
        place = folder / (moment or "whole").replace(" ", "-")
        place.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")

        def again(place: Path = place) -> None:
            made: list[str] = []
            compile_in(place, made, None)
            (place / "made.json").write_text(json.dumps(len(made)))

        killed = None
        if moment is not None:
            status = in_a_process(lambda place=place, moment=moment: compile_in(place, [], moment))  # type: ignore[misc]
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert not (place / "out.onnx").exists()
        status = in_a_process(again)
        made = json.loads((place / "made.json").read_text()) if status == 0 else None
        found[moment or "whole"] = {"killed": killed, "status": status, "made": made}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
