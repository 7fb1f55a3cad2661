"""The errors that a user can meet; each is one sentence with what was got, what was expected and the next step."""

from __future__ import annotations

import re


class LrcompileError(Exception):
    """Base of every error that is reported as a message instead of a traceback."""

    exit_code = 2


class InputError(LrcompileError):
    """A file, option, shape or value that the user gave cannot be used."""


class DeviceError(LrcompileError):
    """A device profile is unknown, incomplete or inconsistent, or a runtime for it is missing."""


class PluginError(LrcompileError):
    """A plugin package could not be loaded, or two plugins claim one name."""


class PassError(LrcompileError):
    """A pass broke its contract: names pass and site, and what was expected and got (the first line of it)."""

    def __init__(self, pass_name: str, site: str, problem: str) -> None:
        first = problem.strip().split("\n")[0]
        super().__init__(f"pass {pass_name} at {site}: {first}; leave it out with --passes=-{pass_name} and report it")
        self.pass_name = pass_name
        self.site = site


class VerificationError(LrcompileError):
    """The rewritten or emitted model does not compute what it should; nothing is written."""


class PlanError(LrcompileError):
    """A plan file cannot be read, or does not belong to this model, device or calibration data."""


class BudgetError(LrcompileError):
    """The budget cannot be met; the message holds the range that can be reached."""

    exit_code = 1


class LatencyError(BudgetError):
    """No choice of rewrites comes to the latency asked for, as they are priced."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch says that memory ran out."""
    words = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message, without terminal colours; its kind where it has none."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0].rstrip(" .")[:300] if lines else type(error).__name__
