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
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.names_torch import with_own_names
from sluice.passes.graph.onnx_file import finalize
from sluice.pipeline.arguments import numeric
from sluice.pipeline.attention_form import marked_like
from sluice.pipeline.choose import Scenario, choose, late_steps
from sluice.pipeline.close import close
from sluice.pipeline.figures import captured_inputs, count_parameters, example_outputs, parity
from sluice.pipeline.gate_candidate import GateCandidate
from sluice.pipeline.kept_stages import Reading, verified_once
from sluice.pipeline.pairs import engine_check
from sluice.pipeline.plain import counted_from
from sluice.pipeline.prepare import Prepared, fits, trainable
from sluice.pipeline.price import price_problem
from sluice.pipeline.progressive import descend
from sluice.pipeline.recipe import REHEARSAL, Evaluate, Recipe, recovery_of
from sluice.pipeline.recover import recover
from sluice.pipeline.report_figures import make_report
from sluice.pipeline.verify import AIM, VerifiedSolution, final_pair, first_verified
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
    stages = recipe.stages.for_(budget)
    budget = counted_from(ready.plain, budget)
    if fits(ready.measured, budget):
        ready, recipe = replace(ready, problem=replace(ready.problem, sites=frozenset())), replace(recipe, epochs=0)
        if recipe.progress:
            dense_ms = ready.measured.latency.dense_ms()
            print(f"{dense_ms:.4g} ms are within {budget.ms(dense_ms):.4g} ms already: nothing is cut", file=sys.stderr)
    gated, measured, reference = ready.gated, ready.measured, ready.teacher
    problem, precision = ready.problem, measured.fingerprint.precision
    data, evaluate, progress = recipe.data, recipe.evaluate, recipe.progress
    if precision == "int8" and data is None:
        raise SluiceError("int8 is calibrated on data; give data= some batches of inputs")
    stripped = ready.captured()
    analysis = analyze(stripped, needed=False, dims=True)  # once, for the plans of all scenarios
    dense_onnx = ready.dense_onnx(stripped)
    target_ms = AIM * budget.ms(measured.latency.dense_ms())
    descent = None
    if recipe.progressive and data is not None and recipe.epochs:
        descent = descend(ready, target_ms, replace(recipe, stages=stages), late_steps(recipe.steps())[0])

    def settled() -> tuple[VerifiedSolution, list[Reading]]:
        scenarios: list[Scenario] = []
        if data is not None and recipe.epochs:
            reached_ms, total = max(target_ms, problem.least_from(target_ms)), recipe.steps()
            candidate = GateCandidate(
                stripped, gated.meta["space"], ready.methods, reference, recipe.loss, recipe.recovery, progress
            )  # fmt: skip
            scenarios = choose(
                problem, ready.methods, reached_ms, lambda solution: trainable(stripped, solution.plan, analysis),
                data=data, teacher=reference, loss=recipe.loss, recovery=recipe.recovery,
                steps=int(recipe.rehearsal * total), total=total, gates=candidate if recipe.gates else None,
                descent=descent, stages=stages, progress=progress,
            )  # fmt: skip
        with stage("decide and verify on engines", progress) as advance:
            rehearsed = {s.problem: s.solution for s in reversed(scenarios)}
            problems = [*(s.problem for s in scenarios), problem]
            verified = first_verified(problems, budget, dense_onnx, advance, rehearsed)
            ahead = next((s.foreseen for s in scenarios if s.solution is verified.solution), None)
            verified = replace(verified, foreseen=ahead)
        return verified, [(s.name, s.solution.choice.promised_ms, s.rehearsed) for s in scenarios]

    lower = {} if descent is None else {"stops": descent.ready.problem}
    verified, readings = verified_once(stages, {"dense": problem, **lower}, settled)
    if descent is not None and verified.problem is descent.ready.problem:
        ready, gated, stripped = descent.ready, descent.ready.gated, descent.captured
        dense_onnx = ready.dense_onnx(stripped)
    slim = trainable(stripped, verified.plan, analysis)
    cut = finalize(rewrite_onnx(dense_onnx, verified.plan))
    closed = parity(close(gated, verified.solution).eval(), slim, cut, stripped)
    _same(closed)

    def deploy(model: onnx.ModelProto, runner: Runner | None = None) -> tuple[onnx.ModelProto, float | None]:
        if precision == "fp32":
            return measured.engine(model), None
        batches = None if data is None else _first(data, CALIBRATION)
        made = deploy_onnx(model, precision, batches, target=measured.target)
        like = example_outputs(slim, stripped)
        module = as_module(made, like, runner=runner, batch=measured.fingerprint.batch)
        return made, None if evaluate is None else evaluate(module)

    deploy(cut)  # rule 5
    metric_dense = ready.metric if evaluate is None or ready.metric is not None else evaluate(reference)
    recovered = None
    if verified.plan.edited():  # what was not cut has nothing to recover
        recipe = replace(recipe, stages=stages)
        recovered = recover(
            slim, verified.plan, recipe, dense=stripped, teacher=reference, foreseen=verified.foreseen
        )  # fmt: skip
    slim = merge_runs(slim, verified.plan).eval()
    with kept(out, slim, verified.plan):
        with stage("export and measure", progress) as advance:
            slim_onnx = finalize(marked_like(to_onnx(slim, captured_inputs(stripped)), measured))
            dense_engine = finalize(dense_onnx)
            runner = measured.runner()
            deployed, metric_deployed = deploy(slim_onnx, runner)
            file = deployed if precision == "fp32" else slim_onnx
            exported = parity(slim, slim, file, stripped)
            times = final_pair(measured, measured.engine(dense_engine), deployed, budget, verified, advance)
            engine = runner.build(deployed, batch=measured.fingerprint.batch)
            outputs = engine_check(measured, engine, deployed, slim_onnx)
        report = make_report(
            measured, verified, times=times, worst=max(closed, exported),
            params=(count_parameters(stripped), count_parameters(slim)),
            macs=(count_macs(dense_engine), count_macs(slim_onnx)),
            metrics=(metric_dense, None if evaluate is None else evaluate(slim), metric_deployed),
            frozen={**measured.space.left_alone, **gated.meta["space"].left_alone, **measured.refused},
            seconds=time.perf_counter() - started, losses=ready.problem.losses, plain=ready.plain,
            readings=readings, recovery=recovered,
            methods=("rank",) if ready.methods == (BSR,) else ready.methods, outputs=outputs,
        )  # fmt: skip
        origin = provenance(verified.plan, report)
        named, deployed = labelled(file, origin), labelled(deployed, origin)
        done = Compressed(with_own_names(slim), verified.plan, named, deployed, report)
        if out is not None:
            done.save(out)
    stages.end()
    _same(exported)  # last: the trained network is saved even then
    if not outputs.same:
        raise outputs.refusal(f"the engine of {measured.target}")
    return done


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
