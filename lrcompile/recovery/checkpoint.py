"""Where a training that was stopped goes on: one file, by the content of everything that decides the result."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrcompile.cache import cache_folder, put_whole

LEFT_S = 30 * 24 * 3600.0  # after which a training that was stopped is given up
OWN = re.compile(r"[0-9a-f]{64}\.pt(\.\w+\.tmp)?")  # what is written here; a folder may have other files in it
SCHEMA = 3  # raise it when the same settings train otherwise


@dataclass(frozen=True)
class Checkpoint:
    """A file that is written whole or not at all; one that is damaged is as none.

    One that `outlives` its training stays when that has ended, so that it need not be done again if what follows is
    stopped; who asked for that drops it.
    """

    path: Path
    outlives: bool = False

    @classmethod
    def of(cls, *facts: Any, folder: str | Path | None = None, outlives: bool = False) -> Checkpoint:
        """The file of a training that `facts` (plain JSON values) decide, by default in the user's cache."""
        key = hashlib.sha256(json.dumps([SCHEMA, torch.__version__, *facts], sort_keys=True).encode()).hexdigest()
        return cls(Path(folder or cache_folder("recover")) / f"{key}.pt", outlives)

    def load(self) -> dict[str, Any] | None:
        """What was saved, or None."""
        try:
            if not self.path.is_file():
                return None
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:  # torch raises what its readers raise: whatever it is, training starts afresh
            return None
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replaces what was saved; a full or read-only disk costs the chance to go on, nothing else.

        What nothing went on with for a month is removed, and so is what an interrupted write left then.
        """
        with suppress(OSError, RuntimeError):
            with put_whole(self.path) as path, path.open("wb") as file:
                torch.save(dict(state), file)
            for other in self.path.parent.iterdir():
                if OWN.fullmatch(other.name) and time.time() - other.stat().st_mtime > LEFT_S:
                    other.unlink()

    def drop(self) -> None:
        """Forgets what was saved; what cannot be removed stays."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
