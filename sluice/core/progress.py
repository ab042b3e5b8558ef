"""How far a stage is, on standard error.

1. A stage of a compression is one line: its name and the time so far, and a bar once it can say how far it is
   (`stage`). It needs tqdm.
2. A stage of a profile counts points (`Progress`): in a bar where tqdm is installed, else in lines, at most one every
   few seconds. Points come in batches, and how many there will be is only known batch by batch. So the total is that
   of the batches begun so far, and the time left speaks of those.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["Advance", "Progress", "bars", "lines", "progress_of", "silent", "stage"]

Advance = Callable[[int, int], None]  # (points done, points known to be needed) of one batch after the other
Progress = Callable[[str], AbstractContextManager[Advance]]  # by the name of the stage

EVERY_S = 5.0


@contextmanager
def stage(name: str, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Show ``name`` and the elapsed time while the body runs.

    Yields:
        ``advance(done, total)``, for a body that can say how far it is; from then on the line is a bar.
    """
    from tqdm import tqdm

    over = threading.Event()
    with tqdm(desc=name, bar_format="{desc} {elapsed}", leave=False, disable=not show) as bar:

        def tick() -> None:
            while not over.wait(1.0):
                bar.refresh()

        def advance(done: int, total: int) -> None:
            if show:
                bar.bar_format, bar.n, bar.total = "{l_bar}{bar}| {n}/{total} [{elapsed}<{remaining}]", done, total
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        if show:
            clock.start()
        try:
            yield advance
        finally:
            over.set()
            if show:
                clock.join()


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
