"""Where a training that was stopped goes on: one file, by the content of everything that decides the result."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1  # raise it when the same settings train otherwise


@dataclass(frozen=True)
class Checkpoint:
    """A file that is written whole or not at all; one that is damaged is as none."""

    path: Path

    @classmethod
    def of(cls, *facts: Any, folder: Path | None = None) -> Checkpoint:
        """The file of a training that `facts` (plain JSON values) decide, by default in the user's cache."""
        base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lrcompile" / "recover"
        key = hashlib.sha256(json.dumps([SCHEMA, torch.__version__, *facts], sort_keys=True).encode()).hexdigest()
        return cls((folder or base) / f"{key}.pt")

    def load(self) -> dict[str, Any] | None:
        """What was saved, or None."""
        if not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, weights_only=True)
        except Exception:  # torch raises what its readers raise: whatever it is, training starts afresh
            return None
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replaces what was saved; a full or read-only disk costs the chance to go on, nothing else."""
        with suppress(OSError, RuntimeError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    torch.save(dict(state), file)
                os.replace(name, self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise

    def drop(self) -> None:
        """Forgets what was saved."""
        self.path.unlink(missing_ok=True)
