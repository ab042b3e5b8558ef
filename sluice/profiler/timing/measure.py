"""Milliseconds per inference on a shared host: sessions take turns until the machine was quiet, the lowest turns count.

1. Noise is one-sided: other processes, a busy sibling hyperthread or a lower clock only ever make a burst slower. Noise
   comes in episodes of 50 ms to seconds, in which everything runs at one slower speed (a factor of 1.2 to 1.3 was
   seen). So the median is useless, because it jumps between the two speeds, and the figure wanted is the fast speed:

       ms = mean of the lowest `MIN_KEPT` turns, without a reference engine (4) of the lowest 3% if these are more

2. Bursts are short and rounds are many. Sessions take turns in a fresh random order every round, so an episode hits all
   of them, and the samples of one session are spread over a long time. Many sessions in one call are better than few.
   A turn has as many bursts in a row as hold `SETTLED` inferences: caches take a while to settle after another engine,
   and a deployed engine runs by itself. Of MobileNetV2 the first burst takes 4 to 8% longer, the second 2 to 4%. Longer
   turns are fewer: with turns of six bursts, eight in all, too few met a quiet machine. A fast speed that was seen once
   is no floor, because the clock rises for moments, too. So of the bursts of a turn the lowest alone counts.
3. A session is measured again until its lowest turns agree with each other:
   ``spread = (largest - smallest of the lowest) / ms``.
4. A *reference engine* is one session more. Its quiet time is known from before, and it says whether the machine was
   *quiet*: the mean of its own lowest `WITNESSES` turns exceeds its quiet time by at most `QUIET`. Until then all
   sessions go on, while there is patience, and the bursts of that time do not count towards ``max_bursts``. A burst of
   the reference engine lasts as long as the longest inference (`LONGEST_MS` at the most), which needs quiet for that
   long. A turn of it has two bursts, because after an engine that empties the caches the first takes some percent
   longer. This test is as good as the known quiet time, so the time of the reference engine in this call is returned as
   well.
5. All turns count, whatever the reference engine took beside them. A process that shares a core slows one kernel by a
   tenth and another by two thirds, and where several threads compute, a burst waits for each of them. So a burst of one
   engine says little about the next burst of another. A busy host is quiet for a few milliseconds now and then, and
   these moments are gathered over the whole call. If even the lowest turns of the reference engine are beyond `BUSY` in
   the end, all figures are told as uncertain. By CPU time, which counts no waiting, they are scaled as well:
   ``ms * reference.ms / (lowest of the reference engine)``.
6. An accelerator raises its clock under load only. So before a call the first session runs for `RAMP_MS`, whatever
   ``warmup_ms`` is; the other sessions find the device awake. A session on an accelerator says so with an attribute
   ``ramps``, which sessions by the wall clock need; without that attribute, a session with the clock ``"cuda"`` ramps.

7. A GPU (the clock ``"cuda"``) settles at the clock that its heat and its power allow, and everything takes that much
   longer. No waiting changes that. So there all figures, that of the reference engine among them, are in the time of
   the reference engine: ``ms * reference.ms / (lowest of the reference engine)``. They are uncertain where its own
   turns do not agree within `BUSY`. What is bound by memory does not follow the clock, and is scaled too much.

The figures behind each rule are in docs/measuring.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sluice.core.errors import SluiceError
from sluice.profiler.table.measurement import UNCERTAIN, Measurement
from sluice.runtime.base.runner import Session, turn

__all__ = ["ReferenceEngine", "Waiting", "measure"]

FRACTION = 0.03
MIN_KEPT = 3
SETTLED = 4  # inferences of a turn
QUIET, BUSY = 0.015, 0.05
WITNESSES = 5  # quiet turns of the reference engine: with three, a twentieth of the sessions would have no quiet turn
LONGEST_MS = 10.0
PATIENCE_MS = 6000.0
MAX_REPEATS = 1 << 20
RAMP_MS = 200.0
TELL_S = 1.0
Waiting = Callable[[float, float], None]  # (share of the reference engine's turns that were quiet, ms of patience left)


@dataclass(slots=True)
class ReferenceEngine:
    """An engine that is measured along with others, and its quiet time ``ms`` (rule 4).

    A call that finds a shorter quiet time sets ``ms``, for all users (`sluice.profiler.timing.reference_engine`).
    """

    session: Session
    ms: float


@dataclass(slots=True)
class _Turns:
    """Turns of one session: the lowest burst of each in milliseconds; how many bursts, in all and while waiting."""

    session: Session
    repeats: int
    length: int
    lowest: list[float] = field(default_factory=list)
    samples: int = 0
    waited: int = 0

    def take(self, most: int, waits: bool) -> float:
        """One more turn of ``most`` bursts at the most; the milliseconds it took."""
        count = min(self.length, max(1, most - self.samples))
        found = [_checked(ms) for ms in turn(self.session, self.repeats, count)]
        self.lowest.append(min(found))
        self.samples += len(found)
        self.waited += len(found) if waits else 0
        return sum(found) * self.repeats

    def figure(self, fraction: float) -> tuple[float, float]:
        """Milliseconds and spread (rules 1 and 3)."""
        kept = np.sort(self.lowest)[: max(MIN_KEPT, math.ceil(fraction * len(self.lowest)))]
        ms = float(np.mean(kept))
        return ms, float(kept[-1] - kept[0]) / ms if ms > 0 else 0.0


def measure(
    sessions: Sequence[Session],
    *,
    min_bursts: int = 40,
    max_bursts: int = 160,
    target_spread: float = 0.03,
    burst_ms: float = 0.5,
    warmup_ms: float = 5.0,
    reference: ReferenceEngine | None = None,
    patience_ms: float = PATIENCE_MS,
    with_reference: bool = False,
    waiting: Waiting | None = None,
    rng: np.random.Generator,
) -> tuple[Measurement, ...]:
    """One measurement per session, in order; ``with_reference``, one more of the reference engine, if there is one.

    Every session is warmed up for ``warmup_ms``, then takes its turns (rule 2) until it has ``min_bursts`` bursts of at
    least ``burst_ms`` each (or one inference) and its spread is at most ``target_spread``, or it has ``max_bursts``.
    Where the reference engine says by then that the machine was not quiet (rule 4), all go on until it was, for bursts
    of ``patience_ms`` by the sessions' clock. A burst costs twice its time, since an inference precedes it. Meanwhile
    ``waiting`` is told how that goes, once a second at most.
    Raises `SluiceError` where the sessions or the reference engine do not share one clock, or a session's time is not
    positive.
    """
    if not 1 <= min_bursts <= max_bursts:
        raise SluiceError(f"cannot measure with min_bursts={min_bursts}, max_bursts={max_bursts}; need 1 <= min <= max")
    if not sessions:
        return ()
    clocks = sorted(
        {session.clock for session in sessions} | ({reference.session.clock} if reference is not None else set())
    )
    if len(clocks) > 1:
        raise SluiceError(f"cannot compare sessions timed by different clocks ({', '.join(clocks)}); use one runner")
    if reference is not None and not (math.isfinite(reference.ms) and reference.ms > 0):
        raise SluiceError(f"the reference engine's time is {reference.ms} ms; measure it first")

    turns = _ready(sessions, reference, burst_ms, warmup_ms)
    own, witness = turns[: len(sessions)], turns[len(sessions) :]
    on_gpu = clocks[0] == "cuda"
    fraction = FRACTION if reference is None else 0.0
    seen: list[float] = []
    excess, waited_ms, told = 0.0, 0.0, time.monotonic()
    while True:
        waits = False
        if few := [each for each in own if each.samples < min_bursts]:
            going = [*few, *witness]
        elif excess > QUIET and not on_gpu:
            waits = True
            going = turns if waited_ms <= patience_ms else []
        else:
            limited = [each for each in own if each.samples - each.waited < max_bursts]
            going = [each for each in limited if each.figure(fraction)[1] > target_spread]
        if not going:
            break
        for k in rng.permutation(len(going)):
            took_ms = going[k].take(max_bursts + going[k].waited, waits)
            waited_ms += took_ms if waits else 0.0
        if reference is not None:
            seen = sorted([*seen, witness[0].lowest[-1]])[:WITNESSES]
            excess = float(np.mean(seen)) / reference.ms - 1.0
        if waits and waiting is not None and reference is not None and time.monotonic() - told >= TELL_S:
            told = time.monotonic()
            quiet = [ms <= (1.0 + QUIET) * reference.ms for ms in witness[0].lowest]
            waiting(sum(quiet) / len(quiet), max(0.0, patience_ms - waited_ms))

    far = excess > BUSY
    if on_gpu:
        far = bool(witness) and witness[0].figure(0.0)[1] > BUSY
    doubt = UNCERTAIN + max(excess, 0.0) if far else 0.0
    scale = 1.0 + excess if on_gpu or (far and clocks[0] == "thread_cpu") else 1.0
    found = []
    for each in own:
        ms, spread = each.figure(fraction)
        found.append(Measurement(ms / scale, max(spread, doubt), each.samples, clocks[0]))
    if reference is not None and with_reference:
        spread = max(witness[0].figure(0.0)[1], doubt)
        ms = (1.0 + excess) * reference.ms / (scale if on_gpu else 1.0)
        found.append(Measurement(ms, spread, witness[0].samples, clocks[0]))
    return tuple(found)


def _ready(
    sessions: Sequence[Session], reference: ReferenceEngine | None, burst_ms: float, warmup_ms: float
) -> list[_Turns]:
    """All of them warmed up (rule 6), with the lengths of their bursts and turns (2 and 4)."""
    everyone = [*sessions, reference.session] if reference is not None else list(sessions)
    ramp_ms = RAMP_MS if any(_ramps(session) for session in everyone) else 0.0
    repeats = [_warm_up(s, burst_ms, warmup_ms if k else max(warmup_ms, ramp_ms)) for k, s in enumerate(everyone)]
    turns = [_Turns(s, n, math.ceil(SETTLED / (n + 1))) for s, n in zip(everyone, repeats, strict=True)]
    if reference is not None:
        turns[-1].repeats = max(turns[-1].repeats, math.ceil(_longest(sessions) / reference.ms))
        turns[-1].length = 2
    return turns


def _longest(sessions: Sequence[Session]) -> float:
    """Milliseconds of the longest inference, `LONGEST_MS` at the most; one hiccup makes none longer."""
    longest = 0.0
    for session in sessions:
        ms = session.sample(1)
        for _ in range(MIN_KEPT - 1):
            ms = min(ms, session.sample(1)) if ms > longest else ms
        longest = max(longest, ms)
        if longest >= LONGEST_MS:
            return LONGEST_MS
    return longest


def _ramps(session: Session) -> bool:
    """Rule 6."""
    return bool(getattr(session, "ramps", session.clock == "cuda"))


def _warm_up(session: Session, burst_ms: float, warmup_ms: float) -> int:
    """Run for ``warmup_ms``; the number of inferences that make a burst."""
    repeats, spent = 1, 0.0
    while True:
        ms = _checked(session.sample(repeats))
        spent += ms * repeats
        if spent >= warmup_ms or repeats >= MAX_REPEATS:
            break
        repeats *= 2
    if ms == 0:
        raise SluiceError(
            f"{repeats} inferences took no time by the {session.clock} clock; use a runner with another clock"
        )
    return max(1, min(MAX_REPEATS, math.ceil(burst_ms / ms)))


def _checked(ms: float) -> float:
    if not math.isfinite(ms) or ms < 0:
        raise SluiceError(f"a session reports {ms} ms per inference; its clock is broken, use another runner")
    return ms
