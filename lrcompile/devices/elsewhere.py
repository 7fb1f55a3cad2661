"""Operations measured in other processes, one after the other: where a process lies in memory changes what they take.

All operations together are some percent slower or faster from one process to the next, as each has its memory at other
addresses (our reading: with `setarch -R`, which gives all the same ones, hardly any of that is left). So a calibration
in one process would be as far off as that one happens to be; of many the differences average out.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from lrcompile.devices.cost import Cost
from lrcompile.devices.measure import LocalCostModel
from lrcompile.devices.networks import Network
from lrcompile.errors import DeviceError
from lrcompile.graph.op import OpDesc

LASTS_S = 60.0  # of which a new process takes some two to start
_ENDS_S = 5.0


@dataclass
class Elsewhere:
    """Measures operations by `LocalCostModel` in a process that is replaced when it has lasted for so many seconds.

    Visits are remembered in `folders`, one a visit; without folders nothing is. Close it, or use it in a `with`.
    """

    folders: Sequence[Path] = ()
    lasts_s: float = LASTS_S
    clock: Callable[[], float] = time.monotonic
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _started: float = field(default=0.0, init=False, repr=False)

    def cost(self, op: OpDesc, visit: int = 0) -> Cost:
        """The price of an operation as measured at a visit, counted from 0.

        Raises:
            DeviceError: it cannot be measured, or its process ended meanwhile.
        """
        return self._asked(op, visit)

    def network(self, network: Network) -> Cost:
        """The price of a whole network, its start included; it is not remembered.

        Raises:
            DeviceError: see `cost`.
        """
        return self._asked(network, 0)

    def _asked(self, what: OpDesc | Network, visit: int) -> Cost:
        process = self._serving()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((what, visit), process.stdin)
            process.stdin.flush()
            found = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            self.close()
            raise DeviceError("the process that measures it ended: is there enough memory?") from None
        if isinstance(found, Cost):
            return found
        raise DeviceError(found)

    def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate(timeout=_ENDS_S)

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serving(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self.clock() - self._started > self.lasts_s:
            self.close()
        if self._process is None:
            # the modules of this process: the folder that it runs in is not looked through for others
            folders = [str(folder) for folder in self.folders]
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({folders!r})"
            pipe = subprocess.PIPE
            self._process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)
            self._started = self.clock()
        return self._process


def serve(folders: Sequence[str]) -> None:
    """What the process does until its input ends: it answers with a price, or the reason why there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # where anything else that is printed goes
    models = [LocalCostModel(Path(folder), measures_only=True) for folder in folders]
    models = models or [LocalCostModel(cache_dir=None, measures_only=True)]
    while True:
        try:
            what, visit = pickle.load(requests)
        except EOFError:
            return
        answer: Any
        try:
            if isinstance(what, Network):
                answer = what.measured()
            else:
                if not folders:
                    models[visit].forget(what)
                answer = models[visit].cost(what)
        except DeviceError as problem:
            answer = str(problem)
        pickle.dump(answer, answers)
        answers.flush()
