"""How far a stage is, on standard error: one display for all stages.

1. A stage shows its name and the time so far, which goes on while the stage cannot say how far it is. Once it can, the
   display has a bar.
2. A stage counts in batches, one after the other. The total is that of its first call and never grows: a stage that
   begins with ``advance(0, most)`` announces how many there are at most. Where there are more than were announced, the
   display counts without a total.
3. A note says what the stage waits for. It goes with the next step, and after `NOTE_S` unless it is renewed. A figure,
   such as a loss, stays beside the count until the next one.
4. On a terminal the display is one line, drawn by tqdm and gone at the end. Where standard error is no terminal, or
   tqdm is missing, there are plain lines: at most one every `EVERY_S` while there is news, else one every `ALIVE_S`,
   and one at the end.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO

__all__ = ["Advance", "Progress", "progress_of", "show_figure", "silent", "stage", "told_to"]

Advance = Callable[[int, int], None]  # (done, total) of one batch after the other; one with a `note` shows notes
Progress = Callable[[str], AbstractContextManager[Advance]]  # by the name of the stage

TICK_S, EVERY_S, ALIVE_S, NOTE_S = 1.0, 5.0, 60.0, 3.0


class Display:
    """The display of one stage; ``counts`` if it has nothing to say in lines where nothing was done."""

    def __init__(self, name: str, stream: TextIO, *, counts: bool = False, now: Callable[[], float] = time.monotonic):
        self.name, self.stream, self.counts, self.now = name, stream, counts, now
        self.started = self.shown = self.noted = now()
        self.done = self.finished = 0
        self.total: int | None = None  # of the first call; 0 once that was too little
        self.at_most = self.news = False
        self.text = self.figure = ""
        self.lock = threading.Lock()
        self.bar = _bar(name, stream)

    def __call__(self, done: int, total: int) -> None:
        """``done`` of the ``total`` of this batch; a batch is over when all of it is done."""
        with self.lock:
            if self.total is None:
                self.total, self.at_most = total, done == 0
            elif self.finished + max(done, total) > self.total:
                self.total = 0
            self.done = self.finished + done
            if done >= total:
                self.finished = self.done
            self.text, self.news = "", True
            self._draw()

    def note(self, text: str) -> None:
        """Say what the stage waits for."""
        with self.lock:
            self.text, self.noted, self.news = text, self.now(), True
            self._draw()

    def tick(self) -> None:
        """Show the time, and drop a note that was not renewed."""
        with self.lock:
            if self.now() - self.noted >= NOTE_S:
                self.text = ""
            self._draw()

    def close(self, failed: bool = False) -> None:
        """Take the line away, or write the last one."""
        with self.lock:
            if self.bar is not None:
                self.bar.close()
            elif self.done or not self.counts:
                took = _duration(self.now() - self.started)
                self._write(f"{self._count()}, {'stopped after' if failed else 'took'} {took}")

    def _draw(self) -> None:
        if self.bar is not None:
            counted = "" if self.total is None else f" {self._number()}"
            counted += f", {self.figure}" if self.figure else ""
            known = self.total and not self.text  # a note needs the room of the bar
            self.bar.bar_format = f"{{l_bar}}{{bar}}|{counted} [{{elapsed}}<{{remaining}}]" if known else (
                f"{{desc}}{counted} {{elapsed}}{{postfix}}"
            )  # fmt: skip
            self.bar.n, self.bar.total = self.done, self.total or None
            self.bar.set_postfix_str(self.text, refresh=False)
            self.bar.refresh()
            return
        now = self.now()
        if now - self.shown < (EVERY_S if self.news else ALIVE_S):
            return
        parts = [self._count(), f"{_duration(now - self.started)} so far"]
        if self.total and 0 < self.done < self.total:
            parts.append(f"{_duration((now - self.started) * (self.total - self.done) / self.done)} left")
        self._write(", ".join([*parts, *(text for text in (self.figure, self.text) if text)]))
        self.shown, self.news = now, False

    def _count(self) -> str:
        return self.name if self.total is None else f"{self.name} {self._number()}"

    def _number(self) -> str:
        if not self.total:
            return f"{self.done}"
        return f"{self.done} of at most {self.total}" if self.at_most else f"{self.done}/{self.total}"

    def _write(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


def _bar(name: str, stream: TextIO) -> Any | None:
    if not stream.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(desc=name, bar_format="{desc} {elapsed}", leave=False, file=stream)


@contextmanager
def running(display: Display, every_s: float = TICK_S) -> Iterator[Advance]:
    """Tick until the body is over, however it ends."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(every_s):
            display.tick()

    clock = threading.Thread(target=tick, name=f"{display.name} (tick)", daemon=True)
    clock.start()
    failed = True
    try:
        yield display
        failed = False
    finally:
        over.set()
        clock.join()
        display.close(failed)


@contextmanager
def stage(name: str, show: bool) -> Iterator[Advance]:
    """Show ``name`` and the time so far while the body runs.

    Yields:
        ``advance(done, total)``, for a body that can say how far it is.
    """
    if not show:
        yield lambda done, total: None
        return
    with running(Display(name, sys.stderr)) as advance:
        yield advance


def show_figure(advance: Advance, text: str) -> None:
    """Show a figure of the stage beside its count, if the stage is shown."""
    if isinstance(advance, Display):
        advance.figure = text


def progress_of(wanted: bool | Progress) -> Progress:
    """A way of showing progress, or the usual one for True and none for False."""
    if not isinstance(wanted, bool):
        return wanted
    return _profiling if wanted else silent


@contextmanager
def silent(name: str) -> Iterator[Advance]:
    yield lambda done, total: None


@contextmanager
def _profiling(name: str) -> Iterator[Advance]:
    with running(Display(f"profile: {name}", sys.stderr, counts=True)) as advance:
        yield advance


def told_to(advance: Advance | None) -> Callable[[float, float], None] | None:
    """What `sluice.profiler.timing.measure` tells of its waiting, as a note; None where no notes are shown."""
    note = getattr(advance, "note", None)
    if note is None:
        return None

    def waiting(quiet: float, left_ms: float) -> None:
        note(
            f"waiting for a quiet machine: quiet {quiet:.0%} of the time, {left_ms / 1000:.0f} s of patience left; "
            f"another process uses this core"  # last, where a narrow terminal cuts it off
        )

    return waiting


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
