"""How far a stage is: bars where tqdm is installed, else lines on standard error, at most one every few seconds.

Points come in batches, and how many there will be is only known batch by batch. So the total is that of the batches
begun so far, and the time left speaks of those.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["Advance", "Progress", "bars", "lines", "progress_of", "silent"]

Advance = Callable[[int, int], None]  # (points done, points known to be needed) of one batch after the other
Progress = Callable[[str], AbstractContextManager[Advance]]  # by the name of the stage

EVERY_S = 5.0


def progress_of(wanted: bool | Progress) -> Progress:
    """A way of showing progress, or the usual one for True and none for False."""
    if not isinstance(wanted, bool):
        return wanted
    return bars if wanted else silent


@contextmanager
def silent(name: str) -> Iterator[Advance]:
    yield lambda done, total: None


@contextmanager
def bars(name: str) -> Iterator[Advance]:
    """A tqdm bar, or `lines` without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        with lines(name) as advance:
            yield advance
        return
    bar = tqdm(desc=f"profile: {name}", unit="point", leave=False, delay=1.0)

    def show(done: int, total: int) -> None:
        bar.total = total
        if done > bar.n:
            bar.update(done - bar.n)

    try:
        yield _summed(show)
    finally:
        bar.close()


@contextmanager
def lines(name: str) -> Iterator[Advance]:
    """``profile: pieces 48/180, 20 s left``, and a last line at the end of the stage."""
    started = shown = time.monotonic()
    points = 0

    def show(done: int, total: int) -> None:
        nonlocal shown, points
        points, now = done, time.monotonic()
        if done < total and now - shown >= EVERY_S:
            shown = now
            left = (now - started) * (total - done) / done
            print(f"profile: {name} {done}/{total}, {_duration(left)} left", file=sys.stderr, flush=True)

    yield _summed(show)
    if points:
        took = _duration(time.monotonic() - started)
        print(f"profile: {name} {points}/{points}, took {took}", file=sys.stderr, flush=True)


def _summed(show: Callable[[int, int], None]) -> Advance:
    """Points of all batches so far, given those of one after the other."""
    finished = 0

    def advance(done: int, of: int) -> None:
        nonlocal finished
        show(finished + done, finished + of)
        if done >= of:
            finished += done

    return advance


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
