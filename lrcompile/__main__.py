"""Where the command starts: `lrcompile` and `python -m lrcompile`. Ctrl-C is one line from the first moment on."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    """Runs the command line and exits with its code."""
    try:
        from lrcompile.cli import run

        code = run(sys.argv[1:])
    except BaseException as error:
        if not _was_interrupted(error):
            raise
        code = INTERRUPTED
    if code == INTERRUPTED:
        sys.stderr.write("lrcompile: interrupted; what was not finished was not written\n")
    sys.exit(code)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error goes back to Ctrl-C: some libraries turn it into an ImportError while they load."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
