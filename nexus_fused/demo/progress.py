"""A progress bar that moves at least once a second, whatever its loop is busy with."""

import threading
from typing import Any

from tqdm import tqdm


class Progress(tqdm):
    """tqdm whose clock goes on between two steps, in a layout that leaves half of 80 columns to the bar."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Start the bar, and the thread that shows it anew; arguments are tqdm's."""
        layout = "{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self._done = threading.Event()
        super().__init__(*args, bar_format=layout, mininterval=0.5, position=0, **kwargs)
        self._clock = threading.Thread(target=self._tick, daemon=True)
        self._clock.start()

    def _tick(self) -> None:
        while not self._done.wait(1.0):
            self.refresh()

    def close(self) -> None:
        """End the bar and its thread."""
        self._done.set()
        clock = getattr(self, "_clock", None)  # None where the bar could not be made
        if clock is not None and clock is not threading.current_thread():
            clock.join()  # or it might draw the bar once more, behind the end of its line
        super().close()
