"""A line on standard error for every stage that takes seconds and cannot say how far it is: name and time so far."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stage"]


@contextmanager
def stage(name: str, show: bool) -> Iterator[None]:
    """Show ``name`` and the elapsed time while the body runs."""
    from tqdm import tqdm

    over = threading.Event()
    with tqdm(desc=name, bar_format="{desc} {elapsed}", leave=False, disable=not show) as bar:

        def tick() -> None:
            while not over.wait(1.0):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        if show:
            clock.start()
        try:
            yield
        finally:
            over.set()
            if show:
                clock.join()
