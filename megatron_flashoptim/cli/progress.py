"""One line on stderr that says how far a command is."""

from __future__ import annotations

import sys
import time

# Seconds between two states of the line, on a terminal and in a log.
_ON_TERMINAL = 0.2
_IN_LOG = 30.0
_WIDTH = 30


class Progress:
    """Shows phase, share and remaining time; call it with phase, done and total.

    Args:
        unit: of what is done.
    """

    def __init__(self, unit: str = "elements") -> None:
        self._unit = unit
        self._terminal = sys.stderr.isatty()
        self._phase = ""
        self._started = 0.0
        self._from = 0
        self._shown = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._phase:
            print(file=sys.stderr)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done in a phase."""
        now = time.monotonic()
        if phase != self._phase:
            if self._terminal and self._phase:
                print(file=sys.stderr)
            self._phase, self._started, self._from, self._shown = phase, now, done, 0.0
        elif done < total and now - self._shown < (_ON_TERMINAL if self._terminal else _IN_LOG):
            return
        self._shown = now
        share = done / total if total else 1.0
        spent = now - self._started
        # The first parts may be tiny, and their rate says nothing.
        known = spent > 0 and 100 * (done - self._from) >= total
        rate = (done - self._from) / spent if known else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
        speed = f"  {_short(rate)}{self._unit}/s{left}" if rate else ""
        text = f"{phase:10} {share:4.0%}{speed}"
        if self._terminal:
            full = round(share * _WIDTH)
            bar = "#" * full + "." * (_WIDTH - full)
            print(f"\r[{bar}] {text}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def _short(rate: float) -> str:
    """Return a number with its unit, at least 0.1 of it."""
    return f"{rate / 1e6:.1f} M " if rate >= 1e5 else f"{rate / 1e3:.1f} k "
