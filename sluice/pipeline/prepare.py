"""Prepare a problem: profile, insert gates and train them or score channels, price every level of every site.

A mistake in the arguments is an error before anything is measured, a budget out of reach before anything is trained.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import fx, nn

from sluice.core.budget_spec import BudgetSpec
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError, Unreachable
from sluice.core.plan import Plan
from sluice.core.progress import stage
from sluice.importance.taylor import learned_scores
from sluice.passes.cut.export import to_onnx, with_values
from sluice.passes.cut.rewrite_torch import rewrite_captured
from sluice.passes.cut.rotate_torch import rotate
from sluice.passes.gates.gating import Gated, absorb_masks, insert_gates, strip_gates
from sluice.passes.graph.capture import Inputs, capture, clone, input_specs
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.preflight_torch import check_module
from sluice.passes.graph.width_limits import FREE, WidthLimits
from sluice.passes.search_space import SearchSpace, agreed, find_search_space, read_torch
from sluice.pipeline.attention_form import marked_for, marked_like
from sluice.pipeline.bsr import stable_rank_loss
from sluice.pipeline.figures import captured_inputs
from sluice.pipeline.insert import insert_all
from sluice.pipeline.kept_stages import found_prices, gates_once, keep_prices
from sluice.pipeline.pairs import PairTimes
from sluice.pipeline.plain import counted_from, plain_share
from sluice.pipeline.price import one_shot_scores, price_problem
from sluice.pipeline.problem import Problem
from sluice.pipeline.recipe import Recipe
from sluice.pipeline.verify import ACCEPTED, AIM
from sluice.profiler.need import SHARES, walk
from sluice.profiler.profile import measured_elsewhere, profile_known, profile_onnx
from sluice.profiler.view import Profile
from sluice.solver.decide import unreachable
from sluice.solver.options import BSR, METHODS
from sluice.training.budget import Budget
from sluice.training.train import count_batches, fit

__all__ = ["Prepared", "check_float32", "check_reachable", "fits", "prepare", "profile", "trainable"]


def profile(
    model: nn.Module,
    example_inputs: Inputs,
    table: str | os.PathLike[str] = ":memory:",
    *,
    batch: int = 1,
    target: str = "ort-cpu",
    threads: int = 1,
    precision: str = "fp32",
    exclude: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    complete: bool = False,
    elsewhere: bool = False,
    minutes: float = math.inf,
    progress: bool = True,
) -> Profile:
    """Measure the dense network on this device, and the plans of some budgets (`sluice.profiler.need.walk`).

    The profile measures what else it is asked for; what ``table`` holds is not measured again. Other arguments are
    those of `sluice.profiler.profile.profile_onnx`.

    Args:
        complete: measure everything now instead, for a table that serves where this device is not at hand.
        minutes: after so many no more is measured, and what is not known is estimated.
        elsewhere: a table that another device filled suffices, if it holds the dense network; the rest is estimated.
    """
    deployment = Deployment(target, batch, threads, precision)
    check_float32(model)
    with stage("export", progress):
        captured = capture(model, example_inputs)
        dense, space = to_onnx(captured, example_inputs), find_search_space(read_torch(captured), exclude)
    measured = _profile(dense, deployment, space, table=table, exclude=exclude, methods=methods, complete=complete,
                        elsewhere=elsewhere, minutes=minutes, progress=progress)  # fmt: skip
    if not complete and measured.open:
        walk(measured, methods)
    return measured


def _profile(
    dense: onnx.ModelProto, deployment: Deployment, space: SearchSpace, *, table: str | os.PathLike[str],
    exclude: Sequence[str], methods: Sequence[str], elsewhere: bool, minutes: float, progress: bool,
    complete: bool = False,
) -> Profile:  # fmt: skip
    if elsewhere and measured_elsewhere(table, deployment):
        return profile_known(dense, table, exclude=exclude, methods=methods, like=space)
    dense = marked_for(dense, deployment)
    return profile_onnx(
        dense, table, deployment=deployment, exclude=exclude, methods=methods, like=space, complete=complete,
        minutes=minutes,
        progress=progress,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Everything that budgets of one network share.

    ``problem`` holds the losses, ``exported`` the dense network as it was before any training, None if that is not
    known. ``plain`` holds the times of plain export's file and of ours (`sluice.pipeline.plain`), ``metric`` the dense
    network's figure of merit, if there is one.
    """

    gated: Gated
    measured: Profile
    methods: tuple[str, ...]
    teacher: nn.Module
    problem: Problem
    exported: onnx.ModelProto | None = None
    plain: PairTimes | None = None
    metric: float | None = None

    def captured(self) -> fx.GraphModule:
        """The dense network without gates, as it was captured."""
        return strip_gates(self.gated, thresholded=True).eval()

    def dense_onnx(self, captured: fx.GraphModule) -> onnx.ModelProto:
        """The file of `captured`, with parameter names."""
        if self.exported is None:
            return marked_like(to_onnx(captured, captured_inputs(captured)), self.measured)
        return with_values(self.exported, captured)


def trainable(captured: fx.GraphModule, plan: Plan, analysis: Analysis | None = None) -> fx.GraphModule:
    """A slim copy, its runs unmerged, as it is trained; ``analysis`` of the captured network with all dimensions."""
    slim = clone(captured)
    rewrite_captured(slim, plan, merged=False, analysis=analysis)
    return slim.eval()


def prepare(
    model: nn.Module, example_inputs: Inputs, budgets: Sequence[BudgetSpec], deployment: Deployment, recipe: Recipe, *,
    table: str | os.PathLike[str], exclude: Sequence[str], methods: tuple[str, ...], limits: WidthLimits = FREE,
    elsewhere: bool = False, minutes: float = math.inf,
) -> Prepared:  # fmt: skip
    """Profile, train gates (if there are ``gate_epochs``) or score channels, price every level of every site.

    Several budgets, or none, may be given where no gates are trained. The recipe has data. ``elsewhere`` is that of
    `profile`.
    """
    data, loss, progress = recipe.data, recipe.loss, recipe.progress
    assert data is not None
    check_float32(model)
    with stage("export", progress):
        captured = capture(model, example_inputs)
        if recipe.rotate:
            rotate(captured)
        exported = to_onnx(captured, example_inputs)
        space = find_search_space(read_torch(captured, dims=recipe.rotate), exclude, limits)
    # Before anything is measured, and of the network as it was captured: what is wrong with it costs nothing then.
    metric = None if recipe.evaluate is None else recipe.evaluate(clone(captured).eval())
    measured = _profile(exported, deployment, space, table=table, exclude=exclude, methods=methods,
                        elsewhere=elsewhere, minutes=minutes, progress=progress)  # fmt: skip
    exported = marked_like(exported, measured)
    with stage("plain export", progress) as advance:
        plain = plain_share(measured, model, example_inputs, exported, advance)
    budgets = [counted_from(plain, each) for each in budgets]
    if budgets and all(fits(measured, each) for each in budgets):  # nothing may move, and nothing is priced or trained
        gated = insert_gates(captured, example_inputs, space=agreed(space, measured.space), kinds=())
        nothing = Problem(measured, gated.meta["space"].analysis, frozenset(), {}, {}, input_specs(captured))
        return Prepared(gated, measured, methods, strip_gates(gated).eval(), nothing, exported, plain, metric)
    space = agreed(space, measured.space)  # a site that the file lacks is neither promised nor cut
    for each in budgets:
        check_reachable(measured, methods, each)  # before the training
    widths_vary = bool(measured.space.analysis.groups)
    gated = insert_gates(captured, example_inputs, space=space, kinds=("filter",) if widths_vary else ())
    teacher = strip_gates(gated).eval()
    scores: Mapping[str, np.ndarray] = {}
    if methods == (BSR,):
        problem = price_problem(gated, measured, methods, scores, data=data, loss=loss)
        if recipe.gate_epochs:
            target_ms = AIM * budgets[0].ms(measured.latency.dense_ms())
            ranks = problem.solve(target_ms).plan.factorizations
            if ranks:
                fit(
                    gated, data, epochs=recipe.gate_epochs, teacher=teacher, lr=recipe.lr,
                    loss=stable_rank_loss(loss, gated, ranks), progress=progress, name="stable ranks",
                )  # fmt: skip
        return Prepared(gated, measured, methods, teacher, problem, exported, plain, metric)
    trained: Gated | None = None
    if recipe.gate_epochs:
        share = budgets[0].ms(measured.latency.dense_ms()) / measured.latency.dense_ms()
        walk(measured, methods, [*(s for s in SHARES if s > share), share])  # the gates' way down
        steps = max(1, recipe.gate_epochs * count_batches(data))
        trained = insert_all(captured, example_inputs, measured, methods, steps=steps, space=space)
    held = None if trained is None else _budget(trained, measured, budgets[0])
    if trained is not None and held is not None:
        gated = trained
        gates_once(
            recipe.stages, gated,
            lambda: fit(
                gated, data, epochs=recipe.gate_epochs, teacher=teacher, budget=held, loss=loss, lr=recipe.lr,
                progress=progress, name="gates",
            ),
        )  # fmt: skip
        scores = learned_scores(gated.gates) if "filter" in methods and widths_vary else {}
        absorb_masks(gated)  # the trained network is priced next
    known = found_prices(recipe.stages)
    if known is not None:
        scores = known[0]
    elif gated is not trained and "filter" in methods and widths_vary:
        scores = one_shot_scores(gated, data, loss)
    with stage("price every choice", progress) as advance:
        problem = price_problem(gated, measured, methods, scores, data=data, loss=loss, advance=advance,
                                losses=None if known is None else known[1])  # fmt: skip
    if known is None:
        keep_prices(recipe.stages, problem)
    return Prepared(gated, measured, methods, teacher, problem, exported, plain, metric)


def _budget(gated: Gated, measured: Profile, budget: BudgetSpec) -> Budget | None:
    """The budget of the gates; None where their sites alone do not reach it.

    Then merges are needed as well, and gates under a budget that they cannot meet would only empty their sites.
    """
    try:
        return Budget(gated, measured, budget)
    except Unreachable:
        return None


def fits(measured: Profile, budget: BudgetSpec) -> bool:
    """Whether the dense network is within the budget as it is, by the margin that engines have to keep."""
    dense_ms = measured.latency.dense_ms()
    return dense_ms <= ACCEPTED * budget.ms(dense_ms)


def check_reachable(measured: Profile, methods: Sequence[str], budget: BudgetSpec) -> None:
    latency = measured.latency
    sites = measured.options.sites(latency, methods)
    target_ms = budget.ms(latency.dense_ms())
    least = Problem(measured, measured.partition.analysis, sites, {}, {}).least_from(target_ms)
    if least > target_ms * (1 + 1e-6):
        raise unreachable(target_ms, least, latency.dense_ms(), methods=methods)


def check_float32(model: nn.Module) -> None:
    """Raises `SluiceError` unless the network is a module in float32; the deployment's precision is another matter.

    Integers and complex numbers stay as they are: no gate and no edit applies to them.
    """
    check_module(model)
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise SluiceError(
                f"parameter {name!r} is {tensor.dtype}; call model.float(), and give the deployment's as precision="
            )
