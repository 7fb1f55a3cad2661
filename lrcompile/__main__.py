"""Where the command starts: `lrcompile` and `python -m lrcompile`. Ctrl-C or SIGTERM is one line from the first on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130


def main() -> None:
    """Runs the command line and exits with its code."""
    try:
        with _terminated_as_interrupted():
            from lrcompile.cli import run

            code = run(sys.argv[1:])
    except BaseException as error:
        if not _was_interrupted(error):
            raise
        code = INTERRUPTED
    if code == INTERRUPTED:
        sys.stderr.write("lrcompile: interrupted; what was not finished was not written\n")
    sys.exit(code)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Lets SIGTERM do what Ctrl-C does, so that what was begun is cleaned up, unless it does something else already."""
    in_main = threading.current_thread() is threading.main_thread()  # Python lets no other set what a signal does
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error goes back to Ctrl-C: some libraries turn it into an ImportError while they load."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
