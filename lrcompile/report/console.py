"""Where the command line prints: what nobody reads any more, or a stream cannot spell, stops no work."""

from __future__ import annotations

import io
import os
import sys

from rich.console import Console


class Screen(Console):
    """A console that falls silent once its reader is gone; Rich would end the program there, with exit code 1."""

    def on_broken_pipe(self) -> None:
        """Sends what is left to print nowhere."""
        self.quiet = True
        discard(self.file.fileno())


def discard(descriptor: int) -> None:
    """Lets what is written to a descriptor go nowhere, what a stream still holds for it too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def prepare_streams() -> None:
    """Opens those of the standard streams that are closed to nowhere; characters that the output lacks become "?"."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
