"""The configuration to build: least loss within the promised milliseconds, over all sites at once, solved exactly.

    minimise   sum_g sum_l  D[g,l] x[g,l]                 D[g,l] = increase of the loss where site g takes level l
    subject to sum_l x[g,l] = 1,  x binary                one level per site (width, rank, switch)
               the model's rules over the switches
               LatencyModel.ms(widths) <= target

1. A price per millisecond and a search of what it leaves find the optimum (`sluice.solver.lagrangian`). Where layers
   share too much for that, the same program is a mixed-integer one. Where that finds nothing in time, the best that the
   price met stands, with the gap that it proved.
2. Its latency row (`sluice.solver.milp`) is the model itself up to the solver's tolerance. ``promised_ms`` is
   nevertheless recomputed from ``LatencyModel.ms``; a solution that exceeds the target by more than a millionth is
   solved again, tightened.
3. A gap lets the solver stop at a configuration with needless changes. The solution is therefore walked downhill
   (`sluice.solver.descent`): in loss, then in structural edits, then towards full widths and ranks.
4. Where a configuration is given to stay `near`, every width and rank of a mixed-integer program has the levels within
   `REACH` of it: a quarter of the columns, for a choice that is good among its surroundings alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.core.errors import SluiceError, Unreachable
from sluice.core.latency import LatencyModel
from sluice.solver.amplitude_losses import by_importance
from sluice.solver.descent import downhill, is_valid, loss_of
from sluice.solver.lagrangian import fastest, least_loss
from sluice.solver.milp import MixedIntegerProgram
from sluice.solver.milp_highs import OutOfTime, solve

__all__ = ["Choice", "decide", "least_ms", "restricted", "tightened", "unreachable"]

TOLERANCE = 1e-6  # relative excess of the recomputed promise that still counts as met
REACH, LOCAL_GAP, LOCAL_S = 2, 1e-2, 3.0  # levels on either side, the least gap, the most seconds (rule 4)
SCALE = 1e3  # of the objective: the solver stops at an absolute gap of 1e-6 as well, and good losses are small
TIE = 1e-5  # cost of a structural edit in that objective
# The word for the sites of a method, in messages.
MEANS = {"filter": "widths", "rank": "ranks", "block": "dropped blocks", "merge": "merged runs", "bsr": "ranks"}


@dataclass(frozen=True, slots=True)
class Choice:
    """One value per site, switches included, and the promised milliseconds.

    ``retained`` is ``1 - loss / (sum over the sites of their largest loss)``, in [0, 1]; for ``least_ms``, which knows
    no losses, the kept share of all widths and ranks, and ``loss`` the rest. ``gap`` is the relative distance to the
    best bound that the solver proved, among its surroundings alone where the choice is ``local``.
    """

    widths: Mapping[str, int]
    promised_ms: float
    loss: float
    retained: float
    gap: float
    seconds: float
    local: bool = False

    def kept(self, importance: Mapping[str, np.ndarray]) -> Mapping[str, tuple[int, ...]]:
        """Sorted indices of the most important channels of every group scored; of equal scores the first."""
        return {
            g: tuple(sorted(by_importance(importance[g])[:w].tolist()))
            for g, w in self.widths.items()
            if g in importance
        }


def decide(
    model: LatencyModel,
    losses: Mapping[str, np.ndarray],
    target_ms: float,
    *,
    gap: float = 1e-2,
    time_limit_s: float = 20.0,
    near: Mapping[str, int] | None = None,
) -> Choice:
    """The configuration of least loss within ``target_ms``; of equal ones that with fewer structural edits.

    Args:
        model: the milliseconds of a configuration.
        losses: by site, the increase of the loss at every one of its levels, shape ``(len(levels[g]),)``, in any one
            unit; sites left out cost nothing at any level. For widths see `sluice.solver.amplitude_losses`.
        target_ms: milliseconds that ``model.ms(widths)`` must not exceed.
        gap: relative distance to the least loss at which the solver may stop.
        time_limit_s: after this many seconds the best configuration found so far is returned, with its gap.
        near: a configuration whose surroundings are searched (rule 4); everything, if they do not reach the target.

    Raises:
        SluiceError: losses of an unknown site, of the wrong shape or sign, a target below what any configuration
            reaches, or none found in time.
    """
    started = time.perf_counter()
    checked = _checked(model, losses)
    if not math.isfinite(target_ms):
        raise SluiceError(f"budget is {target_ms} ms; give a finite number of milliseconds")

    def chosen(widths: Mapping[str, int], gap: float, local: bool = False) -> Choice:
        lost = loss_of(model, checked, widths)
        total = sum(float(loss.max()) for loss in checked.values())
        retained = min(max(1.0 - lost / total, 0.0), 1.0) if total > 0 else 1.0
        return Choice(dict(widths), model.ms(widths), lost, retained, gap, time.perf_counter() - started, local)

    if model.dense_ms() <= target_ms and is_valid(model, model.dense) and loss_of(model, checked, model.dense) <= 0:
        return chosen(model.dense, 0.0)
    unit = (sum(float(loss.max()) for loss in checked.values()) or 1.0) / SCALE
    costs = {g: loss / unit + (TIE * _edits(model, g) if g in model.switches else 0.0) for g, loss in checked.items()}
    exact = least_loss(model, costs, target_ms)
    if exact is None:
        _check_reached(model, target_ms)
        if near is not None:
            around = _narrowed(model, costs, checked, _around(model, near))
            try:
                within = min(time_limit_s, LOCAL_S)
                return chosen(*_least_loss(*around, target_ms, max(gap, LOCAL_GAP), within), local=True)
            except (Unreachable, OutOfTime):
                pass
        return chosen(*_least_loss(model, costs, checked, target_ms, gap, time_limit_s))
    met = downhill(model, checked, exact.widths, max(target_ms, model.ms(exact.widths)))
    if exact.gap <= gap:
        return chosen(met, exact.gap)
    left = _narrowed(model, costs, checked, exact.levels)
    try:
        widths, proved = _least_loss(*left, target_ms, gap, time_limit_s)
    except OutOfTime:
        return chosen(met, exact.gap)
    if loss_of(model, checked, met) < loss_of(model, checked, widths):
        return chosen(met, min(exact.gap, proved))
    return chosen(widths, proved)


def _least_loss(
    model: LatencyModel,
    costs: Mapping[str, np.ndarray],
    losses: Mapping[str, np.ndarray],
    target_ms: float,
    gap: float,
    time_limit_s: float,
) -> tuple[dict[str, int], float]:
    """Values of the sites, and the proved gap."""
    started = time.perf_counter()
    program = MixedIntegerProgram(model)
    objective, bound = program.over_levels(costs), target_ms
    for _ in range(8):
        left = time_limit_s - (time.perf_counter() - started)
        solved = solve(program, objective, bound, gap, max(left, 0.1))
        if solved is None:
            least = least_ms(model, time_limit_s=time_limit_s)
            if least.promised_ms > target_ms * (1 + TOLERANCE):
                dense_ms, structure = model.dense_ms(), bool(model.switches)
                raise unreachable(target_ms, least.promised_ms, dense_ms, structure=structure)
            widths, proved = dict(least.widths), 0.0
        else:
            widths, proved = solved
        promised = model.ms(widths)
        if promised <= target_ms + TOLERANCE * abs(target_ms):
            return downhill(model, losses, widths, max(target_ms, promised)), proved
        bound -= 2 * (promised - target_ms)
    raise RuntimeError(f"the solver's latency row and the model disagree at {widths}")


def _around(model: LatencyModel, near: Mapping[str, int]) -> dict[str, list[int]]:
    """The places of the levels of rule 4."""
    kept: dict[str, list[int]] = {}
    for site, levels in model.levels.items():
        at = int(np.searchsorted(levels, near[site]))
        kept[site] = [k for k in range(len(levels)) if abs(k - at) <= REACH or site in model.switches]
    return kept


def _narrowed(
    model: LatencyModel,
    costs: Mapping[str, np.ndarray],
    losses: Mapping[str, np.ndarray],
    places: Mapping[str, Sequence[int]],
) -> tuple[LatencyModel, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The model, the costs and the losses at the places of these levels."""
    at = [{site: own[list(places[site])] for site, own in values.items()} for values in (costs, losses)]
    return model.narrowed(places), at[0], at[1]


def _check_reached(model: LatencyModel, target_ms: float) -> None:
    """Where it is known without a program that nothing is within the target, say so."""
    quickest = fastest(model)
    if quickest is not None and model.ms(quickest) > target_ms * (1 + TOLERANCE):
        raise unreachable(target_ms, model.ms(quickest), model.dense_ms(), structure=bool(model.switches))


def least_ms(model: LatencyModel, *, time_limit_s: float = 20.0) -> Choice:
    """The configuration of the least promised milliseconds.

    Of equally fast ones the one with fewest structural edits, then that which keeps most of widths and ranks.
    """
    started = time.perf_counter()
    quickest = fastest(model)
    widths, proved = (quickest, 0.0) if quickest is not None else _fewest_ms(model, time_limit_s)
    sizes = {g: size for g, size in model.dense.items() if g not in model.switches}
    channels = sum(sizes.values()) or 1
    costs = {g: -np.asarray(model.levels[g], float) / channels for g in sizes}
    costs |= {s: _edits(model, s) for s in model.switches}
    widths = _filled(model, costs, widths, time_limit_s)
    share = sum(widths[g] for g in sizes) / channels if sizes else 1.0
    return Choice(widths, model.ms(widths), 1.0 - share, share, proved, time.perf_counter() - started)


def _fewest_ms(model: LatencyModel, time_limit_s: float) -> tuple[Mapping[str, int], float]:
    program = MixedIntegerProgram(model)
    solved = solve(program, program.cost, None, 1e-6, time_limit_s)
    if solved is None:
        raise RuntimeError("a program without a budget has no solution")
    return solved


def _filled(
    model: LatencyModel, costs: Mapping[str, np.ndarray], widths: Mapping[str, int], time_limit_s: float
) -> Mapping[str, int]:
    """Of the configurations that are as fast, that of the least costs."""
    most = model.ms(widths)
    exact = least_loss(model, costs, most)
    if exact is not None and exact.gap <= 1e-6:
        return exact.widths
    program = MixedIntegerProgram(model)
    try:
        fuller = solve(program, program.over_levels(costs), most, 1e-6, time_limit_s)
    except OutOfTime:  # no reason to fail: the configuration is the fastest already
        return downhill(model, {}, widths, most)
    return fuller[0] if fuller is not None and model.ms(fuller[0]) <= most + 1e-9 * abs(most) else widths


def tightened(target_ms: float, solve: Callable[[float], Choice]) -> Choice:
    """A choice that promises ``target_ms``, of an algorithm that adds up milliseconds site by site.

    The savings of a site are those of the dense network, and part of them may be a cache penalty (`LatencyModel`, rule
    5) that the choice as a whole does not have. So the algorithm is asked for the missed milliseconds as well, until
    its choice meets the target.

    Raises:
        Unreachable: the first answer of ``solve``, if it is that; of later ones the choice before it counts.
    """
    choice, bound = solve(target_ms), target_ms
    for _ in range(8):
        missed = choice.promised_ms - target_ms
        if missed <= TOLERANCE * abs(target_ms):
            break
        bound -= 2 * missed
        try:
            choice = solve(bound)
        except Unreachable:
            break
    return choice


def unreachable(
    target_ms: float, least: float, dense: float, *, structure: bool = False, methods: Sequence[str] = ()
) -> Unreachable:
    """The error for a budget below the least that is reached, in milliseconds.

    ``methods`` are those that reach it; where they are not known, ``structure`` says that there are ranks and depth.
    """
    means = "widths, ranks and depth together reach" if structure else "filter gates alone reach"
    if methods:
        *first, last = (MEANS[method] for method in methods)
        means = f"{', '.join(first)} and {last} together reach" if first else f"{last} alone reach"
    return Unreachable(
        f"budget {_ms(target_ms)} cannot be met: {means} {_ms(least, up=True)} "
        f"({100 * least / dense:.1f}% of dense {_ms(dense)}); ask for at least that"
    )


def restricted(model: LatencyModel, groups: frozenset[str]) -> LatencyModel:
    """The same model in which all other sites stay dense."""
    return model.pinned(model.dense.keys() - groups)


def _checked(model: LatencyModel, losses: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Losses of every site, zeros where none are given."""
    for site in losses:
        if site not in model.levels:
            raise SluiceError(f"losses are given for {site!r}, which is no site of the model; name one of its sites")
    found = {}
    for site, levels in model.levels.items():
        own = np.asarray(losses.get(site, np.zeros(len(levels))), dtype=float)
        if own.shape != (len(levels),):
            raise SluiceError(f"losses of site {site!r} have shape {own.shape}; give one per level, ({len(levels)},)")
        if not np.isfinite(own).all() or (own < 0).any():
            raise SluiceError(f"losses of site {site!r} are negative or not finite; give increases of the loss")
        found[site] = own
    return found


def _edits(model: LatencyModel, switch: str) -> np.ndarray:
    """1 at the levels of a switch that change the network's structure, 0 at its dense value."""
    return np.asarray([float(level != model.dense[switch]) for level in model.levels[switch]])


def _ms(value: float, *, up: bool = False) -> str:
    """At least three significant digits; rounded up where the figure is one to ask for."""
    decimals = 2 if abs(value) >= 1 or value == 0 else 2 - math.floor(math.log10(abs(value)))
    if up:
        value = math.ceil(value * 10**decimals - 1e-9) / 10**decimals
    return f"{value:.{decimals}f} ms"
