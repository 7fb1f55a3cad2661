"""Where the command starts: `lrcompile` and `python -m lrcompile`. Ctrl-C or SIGTERM is one line from the first on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
SAID = "lrcompile: interrupted; what was not finished was not written\n"


def main() -> None:
    """Runs the command line and exits with its code."""
    try:
        with _interruptible():
            from lrcompile.cli import run

            code = run(sys.argv[1:])
    except BaseException as error:
        if not _was_interrupted(error):
            raise
        code = INTERRUPTED
    if code == INTERRUPTED:
        sys.stderr.write(SAID)
    sys.exit(code)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets SIGTERM do what Ctrl-C does, so that what was begun is cleaned up, unless they do something else already."""
    usual = (signal.SIG_DFL, signal.default_int_handler)
    in_main = threading.current_thread() is threading.main_thread()  # Python lets no other set what a signal does
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if in_main}
    before = {number: handler for number, handler in before.items() if handler in usual}
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises what Ctrl-C raises, or leaves at once while libraries load: some abort where their C++ meets that."""
    if _loads_before_work(frame):
        os.write(2, SAID.encode())
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt


def _loads_before_work(frame: FrameType | None) -> bool:
    """Whether modules are being imported by a command that has not begun, so that there is nothing to clean up."""
    loads = False
    while frame is not None:
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        loads |= code.co_filename.startswith("<frozen importlib")
        if module.startswith("lrcompile.") and module not in ("lrcompile.cli", __name__) and code.co_name != "<module>":
            return False
        frame = frame.f_back
    return loads


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error goes back to Ctrl-C: some libraries turn it into an ImportError while they load."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
