"""The demonstration behind `make demo` and `make bench`: trained models, compiled and measured by the command line.

It fetches real weights, writes them as `model.pt`, and runs the commands that a user would type, shown as they run.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from tools import models

_SUFFIX = {"v100": "", "local": "_local"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MODEL", default=["minilm"], help="minilm, efficientnet-lite0")
    parser.add_argument("--target", action="append", help="device; repeat (default: v100 and local)")
    parser.add_argument("--calibrate", action="store_true", help="give the compiler real sentences or images")
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    targets = options.target or ["v100", "local"]
    for name in options.names:
        folder = options.folder if len(options.names) == 1 else options.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        code = demonstrate(name, targets, folder, options.calibrate)
        if code:
            return code
    return 0


def demonstrate(name: str, targets: Sequence[str], folder: Path, calibrate: bool) -> int:
    """Compiles one model for each target, then measures what the last one gained; returns an exit code."""
    print(f"{name}: trained weights -> {folder / 'model.pt'}", flush=True)
    code = models.main([name, "--out", str(folder / "model.pt"), "--calib", str(folder / "calib.npz")])
    if code:
        return code
    rewritten = ""
    for target in targets:
        rewritten = f"model_lr{_SUFFIX.get(target, '_' + target)}.onnx"
        command = ["lrcompile", "model.pt", "--target", target, "--out", rewritten]
        code = _run([*command, "--calib", "calib.npz"] if calibrate else command, folder)
        if code:
            return code
    print("\nthe same model as torch exports it -> model.onnx", flush=True)
    _export(folder / "model.pt", folder / "model.onnx")
    return _run(["lrcompile", "bench", "model.onnx", rewritten, "--batch", "8"], folder)


def _run(command: Sequence[str], folder: Path) -> int:
    print(f"\n$ {shlex.join(command)}", flush=True)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    try:
        return subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, check=False).returncode
    except FileNotFoundError:
        print("demo: the command lrcompile is not installed beside this Python: run `make setup`", file=sys.stderr)
        return 1


def _export(archive: Path, out: Path) -> None:
    import transformers.modeling_outputs  # noqa: F401 - registers the output classes that archives name

    with archive.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns about here is not the caller's to mend
        program = torch.export.load(file)
        logging.disable(logging.WARNING)
        torch.onnx.export(program, f=out, dynamo=True, opset_version=20, verbose=False, external_data=False)
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    sys.exit(main())
