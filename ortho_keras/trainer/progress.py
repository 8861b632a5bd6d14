"""Progress of a long loop: a bar on a terminal, and elsewhere a line each half minute."""

import contextlib
import shutil
import sys
import time

import keras

LINE_EVERY = 30.0  # seconds


class Progress:
    """Shows how far a loop is, to the chief only.

    Args:
        runtime: `Runtime`.
        log: Function that takes a line.
        total: int, the number of updates' last `done`.
        names: Names of values that a bar shows as they are, not their means.
        quiet: float, seconds before a bar appears.
    """

    def __init__(self, runtime, log, total, names=(), quiet=0.0):
        terminal = runtime.is_chief and sys.stdout.isatty()
        self._bar = keras.utils.Progbar(total, width=10, stateful_metrics=names) if terminal else None
        self._log, self._after = log, time.monotonic() + (quiet if terminal else LINE_EVERY)

    def update(self, done, line, values=()):
        """Shows `done` and a list of pairs `(name, value)` in the bar, or logs the line where one is due."""
        if time.monotonic() < self._after:
            return
        if self._bar:
            with contextlib.suppress(OSError):  # of a terminal that has hung up
                self._bar.update(done, self._fitting(values))
        else:
            self._log(line)
            self._after = time.monotonic() + LINE_EVERY

    @staticmethod
    def _fitting(values):
        """The first of the values, as many as a line of the terminal has room for: a bar over two lines leaves all but one."""
        room, fitting = shutil.get_terminal_size().columns - 40, []
        for name, value in values:
            room -= len(name) + 13
            if room >= 0:
                fitting.append((name, value))
        return fitting
