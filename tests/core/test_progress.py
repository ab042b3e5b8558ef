from __future__ import annotations

import io
import sys
import threading
import time

import pytest

from sluice.core.progress import (
    ALIVE_S,
    EVERY_S,
    NOTE_S,
    TICK_S,
    Display,
    progress_of,
    running,
    show_figure,
    silent,
    stage,
    told_to,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when they are told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ticks() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.endswith("(tick)")]


def plain(clock: Clock, *, counts: bool = False) -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    return Display("price", stream, counts=counts, now=clock), stream


def last(stream: io.StringIO) -> str:
    """What is on the line of a terminal."""
    return stream.getvalue().rpartition("\r")[2].rstrip()


def test_a_stage_names_itself_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with stage("export", True):
        assert ticks() == ["export (tick)"]
    assert "export 00:00" in stream.getvalue() and last(stream) == ""
    assert not ticks()


def test_the_time_goes_on_while_a_stage_cannot_say_how_far_it_is() -> None:
    display = Display("export", Terminal())
    ticked = threading.Event()
    display.tick = ticked.set  # type: ignore[method-assign]
    with running(display, every_s=0.001):
        assert ticked.wait(10.0)
    assert TICK_S == 1.0


@pytest.mark.parametrize("show", [True, False])
def test_an_error_closes_the_display_and_passes_through(show: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), stage("export", show) as advance:
        advance(1, 2)
        raise KeyError("mine")
    assert capsys.readouterr().err == ("export 1/2, stopped after 0 s\n" if show else "")
    assert not ticks()


def test_an_error_takes_the_line_of_a_terminal_away() -> None:
    stream = Terminal()
    with pytest.raises(KeyError), running(Display("export", stream)):
        raise KeyError("mine")
    assert "export" in stream.getvalue() and last(stream) == ""


def test_a_stage_that_knows_how_far_it_is_has_a_bar() -> None:
    stream = Terminal()
    with running(Display("price", stream)) as advance:
        for done in (1, 2, 3):
            advance(done, 4)
            assert f"{25 * done}%" in last(stream) and f" {done}/4 [" in last(stream)
    assert "100%" not in stream.getvalue() and "4/4" not in stream.getvalue()


def test_the_total_is_what_was_announced() -> None:
    stream = Terminal()
    display = Display("pieces", stream)
    display(0, 90)
    for done, of in [(24, 40), (40, 40), (24, 24)]:
        display(done, of)
        assert " of at most 90 [" in last(stream)
    assert " 64 of at most 90 [" in last(stream) and " 71%" in last(stream)
    display.close()


def test_a_total_never_grows() -> None:
    """More than was announced is counted without a total."""
    stream = Terminal()
    display = Display("staircases", stream)
    display(10, 10)
    assert "10/10 [" in last(stream)
    for done, shown in [(3, 13), (7, 17), (10, 20)]:
        display(done, 10)
        assert f"staircases {shown} 00:00" in last(stream) and "%" not in last(stream)
    display.close()


def test_lines_come_at_intervals_and_at_the_end(clock: Clock) -> None:
    display, stream = plain(clock)
    for done in range(1, 60):
        clock.now += 1.0
        display(done, 120)
        display.tick()
    clock.now += 1.0
    display.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 60 // EVERY_S
    assert lines[0] == "price 5/120, 5 s so far, 2 min left"
    assert lines[-1] == "price 59/120, took 60 s"


def test_no_time_is_left_of_what_is_done(clock: Clock) -> None:
    """A stage may go on after its last step, or begin anew with more."""
    display, stream = plain(clock)
    clock.now += EVERY_S
    display(4, 4)
    assert stream.getvalue() == "price 4/4, 5 s so far\n"


def test_lines_without_news_are_rare(clock: Clock) -> None:
    display, stream = plain(clock)
    for _ in range(200):
        clock.now += 1.0
        display.tick()
    display.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + 200 // ALIVE_S and lines[0] == "price, 60 s so far"


def test_a_profile_says_nothing_of_a_stage_that_lacked_nothing(clock: Clock) -> None:
    display, stream = plain(clock, counts=True)
    display.close()
    assert stream.getvalue() == ""
    display, stream = plain(clock, counts=True)
    display(2, 2)
    display.close()
    assert stream.getvalue() == "price 2/2, took 0 s\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_note_appears_and_goes(terminal: bool, clock: Clock) -> None:
    stream = Terminal() if terminal else io.StringIO()
    display = Display("pieces", stream, now=clock)
    tell = told_to(display)
    assert tell is not None

    def shown() -> str:
        return last(stream) if terminal else (stream.getvalue().splitlines() or [""])[-1]

    display(2, 4)
    for _ in range(6):
        clock.now += 1.0
        tell(0.123, 35_400.0)
    waits = "waiting for a quiet machine: quiet 12% of the time, 35 s of patience left; another process uses this core"
    assert shown().endswith(f", {waits}") and "pieces" in shown() and "2/4" in shown()
    clock.now += NOTE_S + EVERY_S
    display.tick()
    assert "waiting" not in shown()
    clock.now += EVERY_S
    tell(0.5, 100.0)
    assert "waiting" in shown()
    clock.now += EVERY_S
    display(4, 4)  # the next step takes a note away, too
    assert "waiting" not in shown()
    display.close()


def test_braces_in_a_note_are_shown() -> None:
    stream = Terminal()
    display = Display("pieces", stream)
    display.note("of {n}")
    assert last(stream).endswith("of {n}")
    display.close()


def test_without_tqdm_a_terminal_has_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    display = Display("pieces", stream, now=clock)
    display(1, 2)
    display.close()
    assert stream.getvalue() == "pieces 1/2, took 0 s\n"


def test_ways_of_showing_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_of(True)("pieces") as advance:
        advance(1, 1)
    assert capsys.readouterr().err == "profile: pieces 1/1, took 0 s\n"
    for quiet in (silent, progress_of(False)):
        with quiet("pieces") as advance:
            advance(1, 1)
            assert told_to(advance) is None
    assert progress_of(silent) is silent and told_to(None) is None
    assert capsys.readouterr().err == ""


def test_steps_and_ticks_do_not_meet() -> None:
    """Steps come from one thread and ticks from another."""
    display = Display("pieces", Terminal())
    until = time.monotonic() + 0.1
    with running(display, every_s=0.0):
        done = 0
        while time.monotonic() < until:
            done += 1
            display(done, 10**9)
    assert display.done == done


def test_a_figure_stays_beside_the_count(clock: Clock) -> None:
    display, stream = plain(clock)
    for done in (1, 2):
        clock.now += EVERY_S
        display(done, 8)
        show_figure(display, f"loss {1 / done}")
    assert stream.getvalue().splitlines()[1] == "price 2/8, 10 s so far, 30 s left, loss 1.0"
    terminal = Terminal()
    shown = Display("price", terminal, now=clock)
    show_figure(shown, "loss 0.5")
    shown(1, 8)
    assert "1/8, loss 0.5" in last(terminal)
    with silent("price") as advance:
        show_figure(advance, "loss 0.5")
