"""Runs a peer in its own environment: `python -m tools.peers.worker FOLDER NAME`, started by `tools/bench_peers.py`.

It reads `original.pt` of the folder, then shares from standard input, one a line, and answers each with a line of JSON:
the torch.export archive that it wrote and notes, or the problem that it had. What peers print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from tools.models import save_archive
from tools.peers.catalogue import PEERS
from tools.peers.original import Compress, NothingToDo, Original


def answered(compress: Compress, share: float, original: Original, path: Path) -> dict[str, Any]:
    """What is answered to one share."""
    made = compress(share)
    save_archive(made.model.eval(), original.batches[0], path)
    return {"path": str(path), "notes": list(made.notes)}


def main() -> int:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # peers print
    warnings.simplefilter("ignore")
    original = Original.load(folder / "original.pt")
    compress: Compress | None = None
    for i, line in enumerate(sys.stdin):
        try:
            if compress is None:
                compress = import_module(f"tools.peers.{PEERS[name].module}").prepared(original, name)
            answer = answered(compress, float(line), original, folder / f"{name}-{i}.pt2")
        except NothingToDo as reason:
            answer = {"nothing": str(reason)}
        except Exception as problem:  # a peer may fail in any way: it is reported, and others go on
            traceback.print_exc()
            answer = {"problem": f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:200]}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
