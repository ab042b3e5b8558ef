"""A line on standard error for every stage that takes seconds: name, time so far, and how far it is if it can say."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["stage"]


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
