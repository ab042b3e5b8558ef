from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from sluice.core.errors import SluiceError
from sluice.profiler.table.measurement import UNCERTAIN, Measurement
from sluice.profiler.timing.measure import LONGEST_MS, RAMP_MS, SETTLED, ReferenceEngine, measure
from sluice.runtime.base.runner import Clock


class Fake:
    """A session that takes ``ms * slowdown``, and up to a few times ``noise`` longer, never shorter."""

    def __init__(self, name: str, ms: float, noise: float = 0.0, journal: list[str] | None = None) -> None:
        self.name, self.ms, self.noise = name, ms, noise
        self.journal = journal if journal is not None else []
        self.repeats: list[int] = []
        self.rng = np.random.default_rng(abs(hash((ms, noise))) % 1000)
        self.clock: Clock = "thread_cpu"
        self.slowdown = 1.0

    def run(self, feeds: object) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def sample(self, repeats: int) -> float:
        self.repeats.append(repeats)
        self.journal.append(self.name)
        return self.ms * self.slowdown * (1.0 + self.noise * float(self.rng.exponential()))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 0.5])
def test_one_sided_noise_is_seen_through(noise: float) -> None:
    truth = [0.03, 0.4, 5.0]
    for found, ms in zip(measure([Fake("s", ms, noise) for ms in truth], rng=rng()), truth, strict=True):
        assert ms <= found.ms <= ms * (1.001 + 0.12 * noise)


def test_episodes_of_a_slower_machine_are_seen_through() -> None:
    class Episodic(Fake):
        def sample(self, repeats: int) -> float:
            self.slowdown = 1.25 if len(self.repeats) // 12 % 4 else 1.0
            return super().sample(repeats)

    (found,) = measure([Episodic("s", 0.4, 0.01)], rng=rng())
    assert found.ms == pytest.approx(0.4, rel=0.01)


def test_noisy_sessions_are_measured_more_often() -> None:
    quiet, noisy = measure([Fake("quiet", 0.5, 0.001), Fake("noisy", 0.5, 2.0)], rng=rng())
    assert quiet.samples == 40 and quiet.spread <= 0.03
    assert noisy.samples > 40
    (hopeless,) = measure([Fake("s", 0.5, 9.0)], rng=rng(), target_spread=1e-6, max_bursts=57)
    assert hopeless.samples == 57 and hopeless.spread > 1e-6


def test_spread_is_the_range_of_the_lowest() -> None:
    class Scripted(Fake):
        def sample(self, repeats: int) -> float:
            self.repeats.append(repeats)
            return (9.0, 1.1, 8.0, 1.0, 7.0, 1.2, 6.0)[(len(self.repeats) - 2) % 7]

    (found,) = measure([Scripted("s", 1.0)], rng=rng(), min_bursts=7, max_bursts=7, warmup_ms=1.0, burst_ms=100.0)
    assert found == Measurement(pytest.approx(1.1), pytest.approx(0.2 / 1.1), 7, "thread_cpu")  # type: ignore[arg-type]


def test_rounds_are_interleaved_in_random_order() -> None:
    journal: list[str] = []
    sessions = [Fake(name, 6.0, 0.0, journal) for name in "abcde"]
    measure(sessions, rng=rng(), min_bursts=18, max_bursts=18)
    bursts = journal[len(sessions) :]
    turns = [bursts[i : i + SETTLED // 2] for i in range(0, len(bursts), SETTLED // 2)]
    assert all(len(set(turn)) == 1 for turn in turns)
    rounds = [tuple(turn[0] for turn in turns[i : i + 5]) for i in range(0, len(turns), 5)]
    assert len(rounds) == 9 and all(sorted(order) == list("abcde") for order in rounds)
    assert len(set(rounds)) > 4


def test_a_moment_of_a_raised_clock_is_no_floor() -> None:
    """All bursts of one turn are quick; in the others, every other one is slow."""

    class Raised(Fake):
        def sample(self, repeats: int) -> float:
            burst = len(self.repeats) - 1  # one goes for warming up
            self.slowdown = 0.9 if burst // 2 == 3 else 1.2 if burst % 2 else 1.0
            return super().sample(repeats)

    (found,) = measure([Raised("s", 6.0)], rng=rng(), min_bursts=48)
    assert found.ms == pytest.approx(6.0, rel=0.035) and found.spread > 0.09 and found.samples == 160


class Cold(Fake):
    """A session whose first inferences after another's take longer: 30% the first, each later one a quarter of that."""

    last: Fake | None = None

    def sample(self, repeats: int) -> float:
        self.since = self.since + 1 if Cold.last is self else 1  # one inference before the clock starts
        Cold.last = self
        taken = sum(0.25**k for k in range(self.since, self.since + repeats)) / repeats
        self.since += repeats
        return super().sample(repeats) * (1.0 + 0.3 * taken)

    since = 0


@pytest.mark.parametrize("ms", [0.02, 0.3, 0.4, 3.0])
def test_a_turn_lasts_until_the_caches_have_settled(ms: float) -> None:
    found = measure([Cold("s", ms) for _ in range(40)], rng=rng(), min_bursts=24)
    assert np.median([m.ms for m in found]) == pytest.approx(ms, rel=0.01)


def test_the_same_seed_gives_the_same_order() -> None:
    journals: list[list[str]] = [[], []]
    for journal in journals:
        measure([Fake(name, 0.7, 0.2, journal) for name in "abc"], rng=rng())
    assert journals[0] == journals[1]


def test_an_accelerator_is_woken_by_the_first_session() -> None:
    def ran_before(clock: Clock, ramps: bool | None = None) -> list[float]:
        """Milliseconds that each of two sessions ran before the first burst of the other."""
        sessions = [Fake("a", 0.25), Fake("b", 0.25)]
        for session in sessions:
            session.clock = clock
            if ramps is not None:
                session.ramps = ramps  # type: ignore[attr-defined]
        measure(sessions, rng=rng(), min_bursts=3, max_bursts=3, warmup_ms=5.0)
        return [0.25 * sum(session.repeats[:-3]) for session in sessions]

    awake = ran_before("thread_cpu")
    assert awake[0] == awake[1] >= 5.0
    assert ran_before("wall") == ran_before("wall", False) == ran_before("cuda", False) == awake
    for ramped in (ran_before("cuda"), ran_before("wall", True)):
        assert ramped[0] >= RAMP_MS > ramped[1] == awake[1]


def test_an_anchor_on_an_accelerator_wakes_it_as_well() -> None:
    """It is awake before the first session, whoever says that it sleeps."""
    first, reference = Fake("a", 0.25), Fake("reference", 0.25)
    reference.ramps = True  # type: ignore[attr-defined]
    measure([first], rng=rng(), min_bursts=3, max_bursts=3, reference=ReferenceEngine(reference, 0.25))
    assert 0.25 * sum(first.repeats[:-3]) >= RAMP_MS


def test_bursts_are_long_enough_and_warm_up_is_by_time() -> None:
    fast, slow = Fake("fast", 0.01), Fake("slow", 3.0)
    measure([fast, slow], rng=rng(), burst_ms=0.5, warmup_ms=5.0)
    assert set(fast.repeats[-40:]) == {50} and set(slow.repeats[-40:]) == {1}
    assert sum(fast.repeats[:-40]) * 0.01 >= 5.0 and sum(slow.repeats[:-40]) * 3.0 >= 5.0


def test_the_anchor_takes_out_what_is_common() -> None:
    sessions, reference = [Fake("a", 0.3), Fake("b", 2.0)], Fake("reference", 0.8)
    for fake in (*sessions, reference):
        fake.slowdown = 1.22
    found = measure(sessions, rng=rng(), reference=ReferenceEngine(reference, 0.8), patience_ms=500.0)
    assert [m.ms for m in found] == [pytest.approx(0.3), pytest.approx(2.0)]
    assert [m.ms for m in measure(sessions, rng=rng())] == [pytest.approx(0.3 * 1.22), pytest.approx(2.0 * 1.22)]


class Shared:
    """A machine on which something else runs at times; each session suffers from it in its own measure."""

    def __init__(self, busy: Callable[[int], bool]) -> None:
        self.bursts, self.busy = 0, busy

    def session(self, ms: float, suffers: float) -> Fake:
        shared = self

        class Suffering(Fake):
            def sample(self, repeats: int) -> float:
                shared.bursts += 1
                self.slowdown = suffers if shared.busy(shared.bursts) else 1.0
                return super().sample(repeats)

        return Suffering("s", ms, 0.001)


@pytest.mark.parametrize("period", [37, 400, 9000])
def test_a_quiet_machine_is_waited_for(period: int) -> None:
    """What shares the core slows the reference by half and a session hardly, or the other way round."""
    shared = Shared(lambda burst: burst % period < 0.8 * period)
    sessions = [shared.session(0.4, 1.02), shared.session(0.7, 1.9), shared.session(3.0, 1.3)]
    reference = ReferenceEngine(shared.session(0.5, 1.5), 0.5)
    found = measure(sessions, rng=rng(), reference=reference, patience_ms=40_000.0)
    assert [m.ms for m in found] == [pytest.approx(ms, rel=0.01) for ms in (0.4, 0.7, 3.0)]


def test_where_the_machine_is_never_quiet_the_anchor_scales() -> None:
    shared = Shared(lambda burst: True)
    sessions = [shared.session(0.4, 1.3), shared.session(3.0, 1.4)]
    found = measure(
        sessions, rng=rng(), reference=ReferenceEngine(shared.session(0.5, 1.3), 0.5), patience_ms=4000.0, max_bursts=50
    )
    assert [m.ms for m in found] == [pytest.approx(0.4, rel=0.01), pytest.approx(3.0 * 1.4 / 1.3, rel=0.01)]
    assert min(m.samples for m in found) > 50
    assert [m.spread for m in found] == [pytest.approx(UNCERTAIN + 0.3, rel=0.01)] * 2


def test_an_engine_that_empties_the_caches_does_not_make_the_machine_seem_busy() -> None:
    """The reference's first inferences after it take longer."""
    Cold.last = None
    reference = ReferenceEngine(Cold("*", 0.13), 0.13)
    found, witness = measure(
        [Cold("s", 2.0)], rng=rng(), reference=reference, min_bursts=24, patience_ms=0.0, with_reference=True
    )
    assert found.samples == 24 and witness.ms < 1.002 * 0.13


class Stretches:
    """A host whose sessions all take ``slow[t]`` times as long in its t-th stretch of 1,000 bursts, then 1."""

    def __init__(self, *slow: float) -> None:
        self.slow, self.bursts = slow, 0

    def session(self, name: str, ms: float) -> Fake:
        host = self

        class Slowed(Fake):
            def sample(self, repeats: int) -> float:
                stretch, host.bursts = host.bursts // 1000, host.bursts + 1
                self.slowdown = host.slow[stretch] if stretch < len(host.slow) else 1.0
                return super().sample(repeats)

        session = Slowed(name, ms)
        session.clock = "wall"
        return session


@pytest.mark.parametrize("seconds", [0.1, 0.4, 3.0])
def test_who_waits_for_a_quiet_machine_is_told_so(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a second at most, and only while there is something to wait for; a round takes ``seconds`` here."""
    clock, told = [0.0], []

    def now() -> float:
        clock[0] += seconds / 2  # asked twice where it tells, else once
        return clock[0]

    monkeypatch.setattr("time.monotonic", now)

    def waiting(share: float, left_ms: float) -> None:
        told.append((clock[0], share, left_ms))

    host = Stretches(*[1.2] * 100)
    reference = ReferenceEngine(host.session("*", 0.5), 0.5)
    session = host.session("a", 0.6)
    measure([session], rng=rng(), reference=reference, patience_ms=200.0, min_bursts=40, waiting=waiting)
    times, shares, left = zip(*told, strict=True)
    assert all(later - sooner >= 1.0 for sooner, later in itertools.pairwise((0.0, *times)))
    assert set(shares) == {0.0} and list(left) == sorted(left, reverse=True) and 0.0 <= left[-1] < left[0] < 200.0

    told.clear()
    host.bursts = 99_980  # quiet soon
    measure([session], rng=rng(), reference=reference, min_bursts=40, waiting=waiting)
    assert not told


def test_the_share_that_was_quiet_is_that_of_the_anchors_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    counter = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(counter)))
    shared = Shared(lambda burst: burst % 60 > 5)
    reference = ReferenceEngine(shared.session(0.5, 1.5), 0.5)
    measure(
        [shared.session(0.7, 1.5)], rng=rng(), reference=reference, min_bursts=6, max_bursts=6, patience_ms=4000.0,
        waiting=lambda share, left_ms: told.append(share),
    )  # fmt: skip
    assert told and 0.0 < told[-1] < 0.5


def test_sessions_go_on_until_the_anchor_was_calm() -> None:
    """All are quick when the call begins, slow soon after, and quick again in the end."""
    host = Stretches(1.0, 1.2, 1.3)
    sessions = [host.session(name, ms) for name, ms in (("a", 0.6), ("b", 7.0))]
    reference = ReferenceEngine(host.session("*", 0.5), 0.5)
    host.bursts = 990
    found = measure(sessions, rng=rng(), reference=reference, min_bursts=24, patience_ms=40_000.0)
    assert [m.ms for m in found] == pytest.approx([0.6, 7.0]) and all(m.spread < 0.01 for m in found)
    assert 2000 < host.bursts < 4000


@pytest.mark.parametrize("every", [60, 150])
def test_quiet_that_comes_rarely_is_gathered(every: int) -> None:
    """One turn in so many is quiet: no stretch of bursts has the three that a figure takes."""

    class Rarely(Fake):
        def sample(self, repeats: int) -> float:
            self.slowdown = 1.0 if len(self.repeats) % every == 0 else 1.3
            return super().sample(repeats)

    sessions = [Rarely("a", 0.6), Rarely("b", 0.2)]
    reference = ReferenceEngine(Rarely("*", 0.5), 0.5)
    for session in (*sessions, reference.session):
        session.clock = "wall"  # type: ignore[misc]
    a, b = measure(sessions, rng=rng(), reference=reference, min_bursts=24)
    assert (a.ms, b.ms) == (pytest.approx(0.6), pytest.approx(0.2)) and max(a.spread, b.spread) < 0.01
    assert a.samples >= 2 * every


def test_a_session_that_disagrees_with_itself_goes_on_alone() -> None:
    host = Stretches()
    steady, noisy, own = host.session("a", 0.6), host.session("b", 0.6), host.session("*", 0.5)
    noisy.noise = 0.5
    one, other, witness = measure(
        [steady, noisy],
        rng=rng(),
        reference=ReferenceEngine(own, 0.5),
        patience_ms=0.0,
        min_bursts=24,
        with_reference=True,
    )
    assert one.samples == witness.samples == 24 < other.samples < 160 and other.spread <= 0.03
    (hopeless,) = measure(
        [Fake("s", 0.5, 9.0)], rng=rng(), reference=ReferenceEngine(Fake("*", 0.5), 0.5), max_bursts=57
    )
    assert hopeless.samples == 57 and hopeless.spread > 0.03


def test_what_was_spent_on_waiting_is_not_counted_against_a_session() -> None:
    """By the time the reference is calm it has had more than its bursts, and disagrees with itself."""
    host = Stretches(1.3, 1.3)
    noisy = host.session("a", 0.6)
    noisy.noise = 9.0
    reference = ReferenceEngine(host.session("*", 0.5), 0.5)
    found, witness = measure(
        [noisy], rng=rng(), reference=reference, target_spread=1e-9, with_reference=True, patience_ms=40_000.0
    )
    assert 500 < witness.samples < found.samples - 100


@pytest.mark.parametrize(("clock", "ms"), [("thread_cpu", 0.6), ("wall", 0.72)])
def test_the_anchor_is_told_as_it_was_and_scales_cpu_time_alone(clock: Clock, ms: float) -> None:
    host = Stretches(*[1.2] * 100)
    session, own = host.session("a", 0.6), host.session("*", 0.5)
    session.clock = own.clock = clock
    found, witness = measure(
        [session], rng=rng(), reference=ReferenceEngine(own, 0.5), patience_ms=40.0, with_reference=True
    )
    assert (found.ms, witness.ms) == (pytest.approx(ms), pytest.approx(0.6))
    assert found.spread == witness.spread == pytest.approx(UNCERTAIN + 0.2)
    (alone,) = measure([session], rng=rng(), with_reference=True)
    assert alone.ms == pytest.approx(0.72)


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.02, 1.1, 1.5])
def test_a_gpu_at_another_clock_is_no_busy_machine(speed: float) -> None:
    """Figures are in the time of the anchor, nobody waits, and nothing is uncertain."""
    host = Stretches(*[speed] * 1000)
    session, own = host.session("a", 0.6), host.session("*", 0.5)
    session.clock = own.clock = "cuda"
    reference = ReferenceEngine(own, 0.5)
    found, witness = measure(
        [session], rng=rng(), reference=reference, patience_ms=40_000.0, with_reference=True, min_bursts=40
    )
    assert (found.ms, witness.ms) == (pytest.approx(0.6), pytest.approx(0.5))
    assert not found.uncertain and not witness.uncertain and found.samples <= 42


def test_a_gpu_whose_clock_will_not_settle_is_uncertain() -> None:
    session, own = Fake("a", 0.6), Fake("*", 0.5, noise=9.0)
    session.clock = own.clock = "cuda"
    found, witness = measure([session], rng=rng(), reference=ReferenceEngine(own, 0.5), with_reference=True,
                             min_bursts=6, max_bursts=6)  # fmt: skip
    assert found.uncertain and witness.uncertain


def test_the_anchors_bursts_last_as_long_as_the_longest_inference() -> None:
    host = Stretches()
    own = host.session("*", 0.5)
    measure([host.session("a", 0.1), host.session("b", 7.0)], rng=rng(), reference=ReferenceEngine(own, 0.5))
    assert own.repeats[-1] == 14


@pytest.mark.parametrize("patience_ms", [0.0, 40.0, 400.0])
def test_a_call_that_was_never_calm_says_so(patience_ms: float) -> None:
    """It goes on for as long as there is patience, and no longer. By the wall clock nothing is scaled."""
    host = Stretches(*[1.2] * 100)
    session, own = host.session("a", 0.6), host.session("*", 0.5)
    reference = ReferenceEngine(own, 0.5)
    (found,) = measure([session], rng=rng(), reference=reference, patience_ms=patience_ms, min_bursts=40)
    assert found.ms == pytest.approx(0.72) and found.spread == pytest.approx(UNCERTAIN + 0.2)
    round_ms = 2 * 0.72 + 2 * 2 * 0.6  # turns are of two bursts, the reference's bursts of two inferences
    steps = 2 * math.ceil(patience_ms / round_ms)
    assert found.samples == pytest.approx(40 + steps, abs=2)


@pytest.mark.parametrize(
    ("slow", "goes_on", "uncertain"), [(1.01, False, False), (1.04, True, False), (1.06, True, True)]
)
def test_what_is_nearly_calm_is_waited_for_but_believed(slow: float, goes_on: bool, uncertain: bool) -> None:
    host = Stretches(*[slow] * 100)
    reference = ReferenceEngine(host.session("*", 0.5), 0.5)
    (found,) = measure([host.session("a", 0.6)], rng=rng(), reference=reference, patience_ms=200.0, min_bursts=24)
    assert (found.samples > 24, found.spread > UNCERTAIN) == (goes_on, uncertain)


def test_one_hiccup_does_not_stretch_the_anchors_bursts() -> None:
    class Hiccup(Fake):
        def sample(self, repeats: int) -> float:
            self.slowdown = 90.0 if len(self.repeats) == 9 else 1.0
            return super().sample(repeats)

    own = Fake("*", 0.5)
    for at in range(4, 12):
        session = Hiccup("a", 0.6)
        session.repeats = [0] * (10 - at)
        measure([session], rng=rng(), reference=ReferenceEngine(own, 0.5), min_bursts=24)
        assert own.repeats[-1] == 2


def test_the_anchors_bursts_are_no_longer_than_need_be() -> None:
    host = Stretches()
    own = host.session("*", 0.5)
    measure([host.session("a", 300.0)], rng=rng(), reference=ReferenceEngine(own, 0.5), min_bursts=1, max_bursts=1)
    assert own.repeats[-1] == LONGEST_MS / 0.5


def test_nothing_to_measure() -> None:
    assert measure([], rng=rng()) == ()


def test_mistakes_are_refused() -> None:
    other = Fake("b", 1.0)
    other.clock = "wall"
    with pytest.raises(SluiceError, match="different clocks"):
        measure([Fake("a", 1.0), other], rng=rng())
    with pytest.raises(SluiceError, match="different clocks"):
        measure([Fake("a", 1.0)], rng=rng(), reference=ReferenceEngine(other, 1.0))
    with pytest.raises(SluiceError, match="reference engine's time"):
        measure([Fake("a", 1.0)], rng=rng(), reference=ReferenceEngine(Fake("b", 1.0), 0.0))
    with pytest.raises(SluiceError, match="min_bursts=5"):
        measure([Fake("a", 1.0)], rng=rng(), min_bursts=5, max_bursts=4)
    with pytest.raises(SluiceError, match="took no time"):
        measure([Fake("a", 0.0)], rng=rng())
    with pytest.raises(SluiceError, match="clock is broken"):
        measure([Fake("a", math.nan)], rng=rng())
