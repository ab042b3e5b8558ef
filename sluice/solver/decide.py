"""The configuration to build: least loss within the promised milliseconds, over all sites at once, solved exactly.

    minimise   sum_g sum_l  D[g,l] x[g,l]                 D[g,l] = increase of the loss where site g takes level l
    subject to sum_l x[g,l] = 1,  x binary                one level per site (width, rank, switch)
               the model's rules over the switches
               LatencyModel.ms(widths) <= target

1. The latency row (`sluice.solver.milp`) is the model itself up to the solver's tolerance. ``promised_ms`` is
   nevertheless recomputed from ``LatencyModel.ms``; a solution that exceeds the target by more than a millionth is
   solved again, tightened.
2. A gap lets the solver stop at a configuration with needless changes. The solution is therefore walked downhill
   (`sluice.solver.descent`): in loss, then in structural edits, then towards full widths and ranks.
3. Where a configuration is given to stay `near`, every width and rank has the levels within `REACH` of it: a program
   of a quarter of the columns, for a choice that is good among its surroundings alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from sluice.core.errors import SluiceError, Unreachable
from sluice.core.latency import LatencyModel
from sluice.solver.amplitude_losses import by_importance
from sluice.solver.descent import downhill, is_valid, loss_of
from sluice.solver.milp import MixedIntegerProgram

__all__ = ["Choice", "decide", "least_ms", "restricted", "tightened", "unreachable"]

TOLERANCE = 1e-6  # relative excess of the recomputed promise that still counts as met
REACH, LOCAL_GAP, LOCAL_S = 2, 1e-2, 3.0  # levels on either side, the least gap, the most seconds (rule 3)
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


class _OutOfTime(SluiceError):
    """The solver has neither found a configuration nor proved that there is none."""


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
        near: a configuration whose surroundings are searched (rule 3); everything, if they do not reach the target.

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
    if near is not None:
        around = _around(model, checked, near)
        try:
            within = min(time_limit_s, LOCAL_S)
            return chosen(*_least_loss(*around, target_ms, max(gap, LOCAL_GAP), within), local=True)
        except (Unreachable, _OutOfTime):
            pass
    return chosen(*_least_loss(model, checked, target_ms, gap, time_limit_s))


def _least_loss(
    model: LatencyModel, losses: Mapping[str, np.ndarray], target_ms: float, gap: float, time_limit_s: float
) -> tuple[dict[str, int], float]:
    """Values of the sites, and the proved gap."""
    started = time.perf_counter()
    program = MixedIntegerProgram(model)
    unit = (sum(float(loss.max()) for loss in losses.values()) or 1.0) / SCALE
    altered = program.over_levels({s: TIE * _edits(model, s) for s in model.switches})
    objective = program.over_levels({g: loss / unit for g, loss in losses.items()}) + altered
    bound = target_ms
    for _ in range(8):
        left = time_limit_s - (time.perf_counter() - started)
        solved = _solve(program, objective, bound, gap, max(left, 0.1))
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


def _around(
    model: LatencyModel, losses: Mapping[str, np.ndarray], near: Mapping[str, int]
) -> tuple[LatencyModel, dict[str, np.ndarray]]:
    """The model and the losses at the levels of rule 3."""
    kept: dict[str, list[int]] = {}
    for site, levels in model.levels.items():
        at = int(np.searchsorted(levels, near[site]))
        kept[site] = [k for k in range(len(levels)) if abs(k - at) <= REACH or site in model.switches]
    narrow = {site: tuple(model.levels[site][k] for k in places) for site, places in kept.items()}
    return replace(model, levels=narrow), {site: losses[site][places] for site, places in kept.items()}


def least_ms(model: LatencyModel, *, time_limit_s: float = 20.0) -> Choice:
    """The configuration of the least promised milliseconds.

    Of equally fast ones the one with fewest structural edits, then that which keeps most of widths and ranks.
    """
    started = time.perf_counter()
    program = MixedIntegerProgram(model)
    solved = _solve(program, program.cost, None, 1e-6, time_limit_s)
    if solved is None:
        raise RuntimeError("a program without a budget has no solution")
    widths, proved = solved
    fastest = model.ms(widths)
    sizes = {g: size for g, size in model.dense.items() if g not in model.switches}
    channels = sum(sizes.values()) or 1
    keep = {g: -np.asarray(model.levels[g], float) / channels for g in sizes}
    altered = {s: _edits(model, s) for s in model.switches}
    try:
        fuller = _solve(program, program.over_levels(keep | altered), fastest, 1e-6, time_limit_s)
    except _OutOfTime:  # no reason to fail: the configuration is the fastest already
        fuller, widths = None, downhill(model, {}, widths, fastest)
    if fuller is not None and model.ms(fuller[0]) <= fastest + 1e-9 * abs(fastest):
        widths = fuller[0]
    share = sum(widths[g] for g in sizes) / channels if sizes else 1.0
    return Choice(widths, model.ms(widths), 1.0 - share, share, proved, time.perf_counter() - started)


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


def _solve(
    program: MixedIntegerProgram, objective: np.ndarray, bound_ms: float | None, gap: float, time_limit_s: float
) -> tuple[dict[str, int], float] | None:
    """Values of the sites and proved gap, or None where none satisfy the bound."""
    model = program.model
    constraints = [program.rows()]
    # Milliseconds may be tiny; HiGHS' feasibility tolerance is absolute, so both rows are put on a scale of one.
    unit = max(abs(model.slope) * float(np.abs(program.cost).max(initial=0.0)), 1e-12)
    if bound_ms is not None:
        room = bound_ms - model.intercept - model.slope * program.constant
        constraints.append(LinearConstraint(model.slope / unit * program.cost[None, :], -np.inf, room / unit))
    else:
        objective = model.slope / unit * objective
    result = milp(
        objective,
        integrality=program.integrality,
        bounds=Bounds(0, program.most),
        constraints=constraints,
        options={"mip_rel_gap": gap, "time_limit": time_limit_s},
    )
    if result.x is None and "nfeasible" in result.message:
        return None
    if result.x is None:
        raise _OutOfTime(
            f"no configuration found in {time_limit_s:.0f} s for {len(model.dense)} sites ({result.message.strip()}); "
            "raise time_limit_s or offer fewer levels per group"
        )
    return program.widths(result.x), float(result.mip_gap or 0.0)


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
