"""Lines on how far a long computation is, a minute apart: in a pod, its log is all that shows that it goes on."""

import time

APART = 60
"""seconds"""


class Minutely:
    """Says a line if the last one, or the beginning, was a minute ago."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def say(self, line: str) -> None:
        """Print ``line``, if it is time."""
        now = time.perf_counter()
        if now - self._at >= APART:
            print(line, flush=True)
            self._at = now
