"""A peer's process, seen from the benchmark: a share goes in, a torch.export archive comes out."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType

from tools.peers.original import NothingToDo

ROOT = Path(__file__).parents[2]


class PeerFailed(Exception):  # noqa: N818 - what failed is the peer
    """A peer could not make a model; the message says why."""


class PeerProcess:
    """A peer at work in its own environment, in a folder of its own inside `folder`, which holds `original.pt`."""

    def __init__(self, python: Path, name: str, folder: Path) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        place = folder / name
        place.mkdir(exist_ok=True)  # some leave files where they run
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python.absolute(), "-m", "tools.peers.worker", folder.absolute(), name],
                cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def compressed(self, share: float) -> tuple[Path, list[str]]:
        """(archive of the model that the peer made, notes).

        Raises:
            NothingToDo: the peer acts on nothing in the model.
            PeerFailed: it failed, or its process ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(share, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self.log.read_text().strip().splitlines() or ["nothing was said"]
            raise PeerFailed(f"its process ended: {said[-1][:300]}")
        answer = json.loads(line)
        if "nothing" in answer:
            raise NothingToDo(answer["nothing"])
        if "problem" in answer:
            raise PeerFailed(answer["problem"])
        return Path(answer["path"]), answer["notes"]
