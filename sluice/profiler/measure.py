"""Milliseconds per inference on a shared host: interleaved bursts, the lowest of them, more where needed.

1. Noise is one-sided: other processes, a busy sibling hyperthread or a lower clock only ever make a burst slower. It
   comes in episodes of 50 ms to seconds in which everything runs at one slower speed (factor 1.2 to 1.3 was seen).
   So the median is useless (it jumps between the two speeds) and the figure wanted is the fast speed:

       ms = mean of the lowest 3% of the turns (at least 3 of them), each as its lowest burst

2. Short bursts, many rounds. Sessions take turns in a fresh random order every round, so that an episode hits all of
   them and the samples of one session are spread over a long time. Many sessions in one call are better than few.
   A turn is as many bursts in a row as hold `SETTLED` inferences, for caches take some to settle after others, and a
   deployed engine runs by itself: of MobileNetV2 the first burst takes 4 to 8% longer, the second 2 to 4%. Longer turns
   are fewer: with turns of six bursts, eight in all, too few met a quiet machine.
3. A session is measured again until the lowest bursts agree with each other:
   ``spread = (largest - smallest of the lowest) / ms``. A fast speed that was seen once is no floor: the clock rises
   for moments, too, so of the bursts of a turn the lowest alone counts.
4. An *anchor*, an engine whose fast figure is known from before, says when the machine is itself. It takes its turn
   every `ANCHOR_EVERY_MS`; the first after an engine of `UPSETS_MS`, which leaves the caches in disorder, is not looked
   at. A burst is *clean* if the anchor's on both sides of it are within `CLEAN` of that figure; clean bursts alone make
   a session's figure, and a session is measured until it has `LEAST` of them. While the anchor is slow, no turn is
   begun; the call waits for as many bursts of the anchor as it has patience. Only where an episode outlasts that, and
   not even `MIN_KEPT` turns are clean, the anchor scales: ``ms * anchor.ms / (anchor's figure beside the same
   bursts)``. That is worth less, since what shares a core slows one kernel by a tenth and another by two thirds.
5. Where several threads compute, by wall time, a burst says little of the one beside it: each waits for its threads
   in its own way. All cores are quiet for a few milliseconds at a time, on a busy host one time in a hundred or less.
   So no burst is put aside, the lowest `MIN_KEPT` turns count, and the anchor that judges ``"calls"`` is one session
   more: once its own lowest `WITNESSES` turns are within `CALM` of its figure from before, there was as much quiet as
   it takes, and until then all go on. Its bursts last as long as the longest inference, which needs quiet for that
   long (`LONGEST_MS` at the most). A session takes `SEVERAL` times as many bursts at the least, and goes on in steps of
   `STEP` until its spread is small, as long as there is patience. If the anchor is beyond `UNCALM` then, all is told as
   uncertain; nothing is scaled. With `CALM` at 5% figures were 3 to 6% too slow on a busy host, with 1.5% 0.4 to 1.3%.
   Calm is as good as the anchor's figure from before, so what the anchor took in this call is told as well.
6. An accelerator raises its clock under load only. So before a call the first session runs for `RAMP_MS`, whatever
   ``warmup_ms`` is; the others find the device awake. A session that runs on an accelerator says so with an attribute
   ``ramps``, which sessions by the wall clock need; without it a session does so if its clock is ``"cuda"``.

What each rule is worth was measured: docs/measuring.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sluice.errors import SluiceError
from sluice.runtime.runner import Clock, Session

__all__ = ["Anchor", "Measurement", "measure"]

FRACTION = 0.03
MIN_KEPT = 3
SETTLED = 4  # inferences of a turn
ANCHOR_EVERY_MS = 2.0
UPSETS_MS = 4.0
CLEAN = 0.12  # beside engines that empty its caches the anchor takes up to 8% longer than alone
LEAST = 12  # clean bursts
PATIENCE = 8000
CALM, UNCALM = 0.015, 0.05
WITNESSES = 5  # turns of the anchor: with three of its own, a twentieth of the sessions would have none
LONGEST_MS = 10.0
SEVERAL, STEP = 4, 48
PATIENT = 10.0  # bursts in steps to one of the anchor's that would be waited for
MAX_REPEATS = 1 << 20
RAMP_MS = 200.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """``ms`` per inference, its relative ``spread`` (rule 3), the number of bursts behind it, and the clock.

    Where the anchor scaled (rule 4), the spread is at least the share that it took out, and more than `CLEAN`, as where
    it stayed far from calm (5).
    """

    ms: float
    spread: float
    samples: int
    clock: Clock


@dataclass(slots=True)
class Anchor:
    """An engine that is measured along with others, and the ``ms`` it takes when nothing disturbs it (4 and 5).

    Whoever finds that it takes less sets ``ms``, for all who share it (`sluice.profiler.anchor`).
    """

    session: Session
    ms: float
    judges: Literal["bursts", "calls"] = "bursts"


@dataclass(slots=True)
class _Bursts:
    """One session's bursts: milliseconds, the turn, and the anchor's beside each as a multiple of its quiet time."""

    ms: list[float] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def figure(self) -> tuple[float, float]:
        """The session's milliseconds and their spread (rules 1, 3 and 4)."""
        if self._clean_turns() >= MIN_KEPT:
            lowest, scale, doubt = self._lowest(self.ms, self._clean()), 1.0, 0.0
        else:
            beside = self._lowest(self.ratios)
            lowest, scale, doubt = self._lowest(self.ms), float(np.mean(beside)), abs(float(beside[-1]) - 1.0)
        spread = float((lowest[-1] - lowest[0]) / np.mean(lowest))
        return float(np.mean(lowest)) / scale, max(spread, doubt)

    def measurement(self, clock: Clock) -> Measurement:
        ms, spread = self.figure()
        return Measurement(ms, spread, len(self.ms), clock)

    def settled(self, target_spread: float) -> bool:
        enough = sum(self._clean()) >= LEAST and self._clean_turns() >= MIN_KEPT
        return enough and self.figure()[1] <= target_spread

    def _clean_turns(self) -> int:
        return len({turn for turn, clean in zip(self.turns, self._clean(), strict=True) if clean})

    def _clean(self) -> list[bool]:
        return [abs(ratio - 1.0) <= CLEAN for ratio in self.ratios]

    def _lowest(self, values: Sequence[float], counts: Sequence[bool] | None = None) -> np.ndarray:
        """The lowest of the turns, each as its lowest burst."""
        least: dict[int, float] = {}
        for k, (value, turn) in enumerate(zip(values, self.turns, strict=True)):
            if counts is None or counts[k]:
                least[turn] = min(value, least.get(turn, value))
        kept = max(MIN_KEPT, math.ceil(FRACTION * len(least)))
        return np.sort(np.asarray(list(least.values()), dtype=np.float64))[:kept]


def measure(
    sessions: Sequence[Session],
    *,
    min_bursts: int = 40,
    max_bursts: int = 160,
    target_spread: float = 0.03,
    burst_ms: float = 0.5,
    warmup_ms: float = 5.0,
    anchor: Anchor | None = None,
    patience: int = PATIENCE,
    with_anchor: bool = False,
    rng: np.random.Generator,
) -> tuple[Measurement, ...]:
    """One measurement per session, in order, and ``with_anchor`` one more, of the anchor in this call.

    Every session is warmed up for ``warmup_ms``, then takes its turns (rule 2) until it has ``min_bursts`` to
    ``max_bursts`` (rule 5: more) bursts of at least ``burst_ms`` each (or one inference), `LEAST` of them clean (all
    are without an anchor) and its spread at most ``target_spread``. The call may wait for the machine to be quiet for
    ``patience`` of the anchor's bursts (rule 5: steps may take the time of `PATIENT` times as many). A burst costs
    twice its time, since an inference precedes it, and the anchor's turns come on top.
    Raises `SluiceError` where the sessions or the anchor do not share one clock, or a session's time is not positive.
    """
    if not 1 <= min_bursts <= max_bursts:
        raise SluiceError(f"cannot measure with min_bursts={min_bursts}, max_bursts={max_bursts}; need 1 <= min <= max")
    if not sessions:
        return ()
    everyone = [*sessions, anchor.session] if anchor is not None else list(sessions)
    clocks = sorted({session.clock for session in everyone})
    if len(clocks) > 1:
        raise SluiceError(f"cannot compare sessions timed by different clocks ({', '.join(clocks)}); use one runner")
    if anchor is not None and not (math.isfinite(anchor.ms) and anchor.ms > 0):
        raise SluiceError(f"the anchor's time is {anchor.ms} ms; measure it first")

    if anchor is not None and anchor.judges == "calls":
        limit_ms = PATIENT * patience * burst_ms
        least, most = SEVERAL * min_bursts, SEVERAL * max_bursts
        found = _until_calm(sessions, anchor, least, most, target_spread, burst_ms, warmup_ms, limit_ms, rng)
        return found if with_anchor else found[:-1]
    ramp_ms = RAMP_MS if any(_ramps(session) for session in everyone) else 0.0
    repeats = [_warm_up(s, burst_ms, warmup_ms if k else max(warmup_ms, ramp_ms)) for k, s in enumerate(everyone)]
    bursts, of_anchor = [_Bursts() for _ in sessions], _Bursts()
    lengths = [math.ceil(SETTLED / (n + 1)) for n in repeats]

    def ratio(after_ms: float = 0.0) -> float:
        if anchor is None:
            return 1.0
        if after_ms >= UPSETS_MS:
            anchor.session.sample(repeats[-1])
        of_anchor.ms.append(anchor.session.sample(repeats[-1]))
        of_anchor.turns.append(len(of_anchor.turns))
        of_anchor.ratios.append(1.0)
        return of_anchor.ms[-1] / anchor.ms

    def wanted(own: _Bursts) -> bool:
        return len(own.ms) < min_bursts or (len(own.ms) < max_bursts and not own.settled(target_spread))

    before = ratio()
    turn = 0
    while active := [i for i, own in enumerate(bursts) if wanted(own)]:
        turn += 1
        waiting: list[_Bursts] = []  # for the anchor's turn
        spent = 0.0
        for i in rng.permutation(active):
            while abs(before - 1.0) > CLEAN and patience > 0:
                before, patience = ratio(), patience - 1
            for _ in range(min(lengths[i], max_bursts - len(bursts[i].ms))):
                waiting.append(bursts[i])
                bursts[i].ms.append(sessions[i].sample(repeats[i]))
                bursts[i].turns.append(turn)
                spent += bursts[i].ms[-1] * repeats[i]
                if spent >= ANCHOR_EVERY_MS:
                    before = _beside(waiting, before, ratio(spent))
                    waiting, spent = [], 0.0
        if waiting:
            before = _beside(waiting, before, ratio())

    told = [*bursts, of_anchor] if with_anchor and anchor is not None else bursts
    return tuple(own.measurement(clocks[0]) for own in told)


def _until_calm(
    sessions: Sequence[Session],
    anchor: Anchor,
    least: int,
    most: int,
    target_spread: float,
    burst_ms: float,
    warmup_ms: float,
    limit_ms: float,
    rng: np.random.Generator,
) -> tuple[Measurement, ...]:
    """Rule 5: ``least`` bursts of each, then steps in which bursts take ``limit_ms``, to ``most`` once it was calm.

    The anchor's measurement is the last.
    """
    everyone = [*sessions, anchor.session]
    repeats = [_warm_up(session, burst_ms, warmup_ms) for session in everyone]
    lengths = [math.ceil(SETTLED / (n + 1)) for n in repeats]
    longest = max(min(session.sample(1) for _ in range(MIN_KEPT)) for session in sessions)
    repeats[-1] = max(repeats[-1], math.ceil(min(longest, LONGEST_MS) / anchor.ms))
    turns: list[list[float]] = [[] for _ in everyone]
    samples = [0] * len(everyone)
    going: Sequence[int] = range(len(everyone))
    spent_ms, goal = 0.0, least
    while True:
        while spent_ms <= limit_ms and (due := [k for k in going if samples[k] < goal]):
            for k in rng.permutation(due):
                bursts = [everyone[k].sample(repeats[k]) for _ in range(min(lengths[k], goal - samples[k]))]
                turns[k].append(min(bursts))
                samples[k] += len(bursts)
                spent_ms += sum(bursts) * repeats[k] if goal > least else 0.0
        lowest = [np.sort(own)[:MIN_KEPT] for own in turns]
        ms = [float(np.mean(own)) for own in lowest]
        spreads = [float(own[-1] - own[0]) / mean if mean > 0 else 0.0 for own, mean in zip(lowest, ms, strict=True)]
        excess = float(np.mean(np.sort(turns[-1])[:WITNESSES])) / anchor.ms - 1.0
        if excess <= CALM:
            going = [k for k, _ in enumerate(sessions) if spreads[k] > target_spread and samples[k] < most]
        if not going or not spent_ms < limit_ms:
            break
        goal += STEP
    doubt = CLEAN + excess if excess > UNCALM else 0.0
    ms[-1] = (1.0 + excess) * anchor.ms
    return tuple(
        Measurement(ms[k], max(spreads[k], doubt), samples[k], session.clock) for k, session in enumerate(everyone)
    )


def _beside(bursts: Sequence[_Bursts], before: float, after: float) -> float:
    """The bursts between two of the anchor's; the later of them, which is the next one's earlier."""
    for each in bursts:
        each.ratios.append(max(before, after))
    return after


def _ramps(session: Session) -> bool:
    """Rule 6."""
    return bool(getattr(session, "ramps", session.clock == "cuda"))


def _warm_up(session: Session, burst_ms: float, warmup_ms: float) -> int:
    """Run for ``warmup_ms``; the number of inferences that make a burst."""
    repeats, spent = 1, 0.0
    while True:
        ms = session.sample(repeats)
        if not math.isfinite(ms) or ms < 0:
            raise SluiceError(f"a session reports {ms} ms per inference; its clock is broken, use another runner")
        spent += ms * repeats
        if spent >= warmup_ms or repeats >= MAX_REPEATS:
            break
        repeats *= 2
    if ms == 0:
        raise SluiceError(
            f"{repeats} inferences took no time by the {session.clock} clock; use a runner with another clock"
        )
    return max(1, min(MAX_REPEATS, math.ceil(burst_ms / ms)))
