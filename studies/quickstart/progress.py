"""A line every few seconds while something takes its time, in a terminal and in a log file alike."""

from __future__ import annotations

import threading
import time
from types import TracebackType

SECONDS = 6.0  # between two lines


class Phase:
    """Says what is being done when it begins, and every few seconds how far it is.

    A thread of its own prints, so a long call in the block does not silence it. `show` turns all of it off.
    """

    def __init__(self, description: str, show: bool = True) -> None:
        self.description, self.show = description, show
        self.state = "still at it"
        self._began = 0.0
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def at(self, state: str) -> None:
        """Sets what the next line says."""
        self.state = state

    def __enter__(self) -> Phase:
        self._began = time.perf_counter()
        if self.show:
            print(f"{self.description} ...", flush=True)
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self.show:
            self._ticker.join()

    def _tick(self) -> None:
        while not self._over.wait(SECONDS):
            print(f"  {self.description}: {self.state}, {time.perf_counter() - self._began:.0f} s", flush=True)
