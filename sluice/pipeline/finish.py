"""From a prepared problem to its result: decide and verify, close, cut, fine-tune, export, measure, report.

1. The plan is decided and its engine measured *before* fine-tuning, since latency does not depend on the weights.
2. Closing and cutting are exact; their parity (closed = slim torch = slim ONNX) is part of the report. Accuracy changes
   only in the two training stages, in the decision between them, and in the precision of the file.
3. All networks up to that file are fp32; engines are timed in the precision of the deployment. int8 is calibrated on
   `CALIBRATION` inputs of the training data.
4. The engine of the file is compared with fp32, and the figure of merit in another precision is the engine's own. One
   that computes another network is an error; the result is saved even so.
5. Two steps may fail with a precision, writing the file and evaluating it. Both are tried on the cut network before it
   is trained.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
from torch import nn
from torch.utils import _pytree as pytree

from sluice.artifacts.deploy import as_module, deploy_onnx
from sluice.artifacts.labels import labelled, provenance
from sluice.artifacts.macs import count_macs
from sluice.artifacts.result import Compressed
from sluice.artifacts.store_trained import kept
from sluice.core.budget_spec import BudgetSpec
from sluice.core.errors import SluiceError
from sluice.core.progress import stage
from sluice.importance.taylor import learned_scores
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import merge_runs
from sluice.passes.gates.gating import Gated, strip_gates
from sluice.passes.graph.names_torch import with_own_names
from sluice.passes.graph.onnx_file import finalize
from sluice.pipeline.arguments import numeric
from sluice.pipeline.attention_form import marked_like
from sluice.pipeline.close import close
from sluice.pipeline.figures import captured_inputs, count_parameters, example_outputs, parity
from sluice.pipeline.pairs import engine_check
from sluice.pipeline.plain import counted_from
from sluice.pipeline.prepare import Prepared, fits
from sluice.pipeline.price import price_problem
from sluice.pipeline.recipe import REHEARSAL, Evaluate, Recipe, recovery_of
from sluice.pipeline.recover import recover
from sluice.pipeline.report_figures import make_report
from sluice.pipeline.settle import settle
from sluice.pipeline.verify import final_pair
from sluice.profiler.profile import Profile
from sluice.runtime.base.runner import Runner
from sluice.solver.options import BSR, check_methods
from sluice.training.budget import Budget
from sluice.training.losses import loss_of
from sluice.training.recovery import AUTO, Rate, Recovery
from sluice.training.train import Data, Loss, split_batch

__all__ = ["carry_out", "finish"]

CALIBRATION = 512
PARITY = 1e-4  # relative; beyond this a rewrite has changed the function, which is a bug


def finish(
    gated: Gated,
    budget: Budget,
    *,
    methods: Sequence[str] = ("filter",),
    importance: Mapping[str, np.ndarray] | None = None,
    teacher: nn.Module | None = None,
    data: Data | None = None,
    epochs: int = 0,
    rehearsal: float = REHEARSAL,
    lr: Rate = AUTO,
    recovery: Recovery | None = None,
    loss: Loss | str | None = None,
    evaluate: Evaluate | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Compressed:
    """Decide, verify on the engine, close, cut, fine-tune, export, measure, report.

    Args:
        gated: trained gated network.
        budget: made with a profile (not a bare latency model: the engine has to be measured).
        methods: some of those the budget's profile was made for; all but ``filter`` need ``data``.
        importance: scores by group; those the gates collected if not given.
        teacher: dense network, for fine-tuning (``epochs`` over ``data``) and as the report's reference.
    """
    if budget.profile is None:
        raise SluiceError("this budget has no profile, so no engine can be measured; make it from sluice.profile(...)")
    methods, taken = check_methods(methods), loss_of(loss)
    figure = None if evaluate is None else numeric(evaluate)
    recipe = Recipe(data, taken, recovery_of(lr, recovery), 0, epochs, rehearsal, figure, progress)
    given = importance if importance is not None else {}
    learned = importance is None and "filter" in methods and gated.meta["space"].analysis.groups
    scores = learned_scores(gated.gates) if learned else given
    with stage("price every choice", progress) as advance:
        problem = price_problem(gated, budget.profile, methods, scores, data=data, loss=taken, advance=advance)
    reference = teacher if teacher is not None else strip_gates(gated, thresholded=True).eval()
    ready = Prepared(gated, budget.profile, methods, reference, problem)
    return carry_out(ready, budget.target, recipe, out=out, started=time.perf_counter())


def carry_out(
    ready: Prepared, budget: BudgetSpec, recipe: Recipe, *, out: str | os.PathLike[str] | None, started: float
) -> Compressed:
    """The way of one budget, from a prepared problem to its result."""
    recipe = replace(recipe, stages=recipe.stages.for_(budget))
    budget = counted_from(ready.plain, budget)
    if fits(ready.measured, budget):
        ready, recipe = replace(ready, problem=replace(ready.problem, sites=frozenset())), replace(recipe, epochs=0)
        if recipe.progress:
            dense_ms = ready.measured.latency.dense_ms()
            print(f"{dense_ms:.4g} ms are within {budget.ms(dense_ms):.4g} ms already: nothing is cut", file=sys.stderr)
    measured, evaluate = ready.measured, recipe.evaluate
    if measured.fingerprint.precision == "int8" and recipe.data is None:
        raise SluiceError("int8 is calibrated on data; give data= some batches of inputs")
    settled = settle(ready, budget, recipe)
    ready, verified, dense = settled.ready, settled.verified, settled.captured
    cut = finalize(rewrite_onnx(settled.dense_onnx, verified.plan))
    closed = parity(close(ready.gated, verified.solution).eval(), settled.slim, cut, dense)
    _same(closed)
    deploy = partial(_deployed, measured=measured, recipe=recipe, like=example_outputs(settled.slim, dense))
    deploy(cut)  # rule 5
    metric_dense = ready.metric if evaluate is None or ready.metric is not None else evaluate(ready.teacher)
    recovered = None
    if verified.plan.edited():  # what was not cut has nothing to recover
        recovered = recover(
            settled.slim, verified.plan, recipe, dense=dense, teacher=ready.teacher, foreseen=verified.foreseen
        )  # fmt: skip
    slim = merge_runs(settled.slim, verified.plan).eval()
    with kept(out, slim, verified.plan):
        with stage("export and measure", recipe.progress) as advance:
            slim_onnx = finalize(marked_like(to_onnx(slim, captured_inputs(dense)), measured))
            dense_engine = finalize(settled.dense_onnx)
            runner = measured.runner()
            deployed, metric_deployed = deploy(slim_onnx, runner)
            file = deployed if measured.fingerprint.precision == "fp32" else slim_onnx
            exported = parity(slim, slim, file, dense)
            times = final_pair(measured, measured.engine(dense_engine), deployed, budget, verified, advance)
            engine = runner.build(deployed, batch=measured.fingerprint.batch)
            outputs = engine_check(measured, engine, deployed, slim_onnx)
        report = make_report(
            measured, verified, times=times, worst=max(closed, exported),
            params=(count_parameters(dense), count_parameters(slim)),
            macs=(count_macs(dense_engine), count_macs(slim_onnx)),
            metrics=(metric_dense, None if evaluate is None else evaluate(slim), metric_deployed),
            frozen={**measured.space.left_alone, **ready.gated.meta["space"].left_alone, **measured.refused},
            seconds=time.perf_counter() - started, losses=ready.problem.losses, plain=ready.plain,
            readings=settled.readings, recovery=recovered,
            methods=("rank",) if ready.methods == (BSR,) else ready.methods, outputs=outputs,
        )  # fmt: skip
        origin = provenance(verified.plan, report)
        named, deployed = labelled(file, origin), labelled(deployed, origin)
        done = Compressed(with_own_names(slim), verified.plan, named, deployed, report)
        if out is not None:
            done.save(out)
    recipe.stages.end()
    _same(exported)  # last: the trained network is saved even then
    if not outputs.same:
        raise outputs.refusal(f"the engine of {measured.target}")
    return done


def _deployed(
    model: onnx.ModelProto,
    runner: Runner | None = None,
    *,
    measured: Profile,
    recipe: Recipe,
    like: object,
) -> tuple[onnx.ModelProto, float | None]:
    """The file in the precision of the deployment, and the figure of merit of its engine where that is not fp32."""
    precision = measured.fingerprint.precision
    if precision == "fp32":
        return measured.engine(model), None
    batches = None if recipe.data is None else _first(recipe.data, CALIBRATION)
    made = deploy_onnx(model, precision, batches, target=measured.target)
    module = as_module(made, like, runner=runner, batch=measured.fingerprint.batch)
    return made, None if recipe.evaluate is None else recipe.evaluate(module)


def _first(data: Data, count: int) -> Iterator[object]:
    """Batches until ``count`` inputs have come."""
    for batch in data:
        yield batch
        count -= len(pytree.tree_leaves(split_batch(batch)[0])[0])
        if count <= 0:
            return


def _same(worst: float) -> None:
    if worst > PARITY:
        raise AssertionError(f"two forms of the slim network differ by {worst:.2e} of the output's scale")
