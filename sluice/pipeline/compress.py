"""One model's whole way: profile, learn gates, decide and verify, close, cut, fine-tune, export, measure, report.

1. The plan is decided and its engine measured *before* fine-tuning, since latency does not depend on the weights.
2. Closing and cutting are exact; their parity (closed = slim torch = slim ONNX) is part of the report. Accuracy changes
   only in the two training stages, in the decision between them, and in the precision of the file.
3. All networks up to that file are fp32; engines are timed in the precision of the deployment. int8 is calibrated on
   `CALIBRATION` inputs of the training data.
4. Two steps may fail with a precision, writing the file and evaluating it. Both are tried on the cut network before it
   is trained.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from torch import nn
from torch.utils import _pytree as pytree

from sluice.artifacts.deploy import as_module, deploy_onnx
from sluice.artifacts.folder import check_writable
from sluice.artifacts.labels import labelled, provenance
from sluice.artifacts.macs import count_macs
from sluice.artifacts.result import Compressed
from sluice.artifacts.store_trained import kept
from sluice.core.budget_spec import AllowedDrop, BudgetSpec, parse_budget
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.core.progress import stage
from sluice.importance.taylor import learned_scores
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import merge_runs
from sluice.passes.gates.gating import Gated, strip_gates
from sluice.passes.graph.capture import Inputs
from sluice.passes.graph.names_torch import with_own_names
from sluice.passes.graph.onnx_file import finalize
from sluice.pipeline.arguments import check_paths, numeric, patterns, recipe_of, room_for
from sluice.pipeline.choose import Scenario, choose
from sluice.pipeline.close import close
from sluice.pipeline.figures import captured_inputs, count_parameters, example_outputs, parity
from sluice.pipeline.gate_candidate import GateCandidate
from sluice.pipeline.least import check_least, find_least
from sluice.pipeline.plain import counted_from
from sluice.pipeline.prepare import Prepared, prepare, trainable
from sluice.pipeline.price import price_problem
from sluice.pipeline.recipe import REHEARSAL, Evaluate, Recipe, recovery_of
from sluice.pipeline.recover import recover
from sluice.pipeline.report_figures import make_report
from sluice.pipeline.verify import AIM, final_pair, first_verified
from sluice.solver.options import BSR, METHODS, check_methods
from sluice.training.budget import Budget
from sluice.training.losses import loss_of
from sluice.training.recovery import AUTO, Rate, Recovery
from sluice.training.train import Data, Loss, split_batch

__all__ = ["Compressed", "compress", "finish", "sweep"]

CALIBRATION = 512
PARITY = 1e-4  # relative; beyond this a rewrite has changed the function, which is a bug


def compress(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budget: str | Mapping[str, str | float],
    data: Data,
    table: str | os.PathLike[str] = ":memory:",
    out: str | os.PathLike[str] | None = None,
    batch: int = 1,
    target: str = "ort-cpu",
    threads: int = 1,
    precision: str = "fp32",
    exclude: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    gate_epochs: int = 0,
    epochs: int = 10,
    rehearsal: float = REHEARSAL,
    gates: bool = False,
    lr: Rate = AUTO,
    recovery: Recovery | None = None,
    loss: Loss | str | None = None,
    evaluate: Evaluate | None = None,
    minutes: float = math.inf,
    progress: bool = True,
) -> Compressed:
    """Make ``model`` fit a measured latency budget.

    Args:
        model: trained network; not changed.
        example_inputs: tensor, tuple or mapping; axis 0 is the batch.
        budget: ``"50%"`` of the dense latency, ``"2.4ms"`` or ``{"latency_ms": 2.4}``, at ``batch`` on ``target``;
            ``"-1.0"`` for the least latency at which ``evaluate`` gives at most 1.0 less (`sluice.pipeline.least`).
        data: re-iterable batches, ``(inputs, labels)`` or inputs alone.
        table: latency table (SQLite), made or continued.
        out: folder for plan, weights, ONNX and report.
        precision: of the deployed and timed network: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        methods: some of ``filter``, ``rank``, ``block``, ``merge``; the edits on offer.
        gate_epochs: epochs of training with gates; 0 scores channels in one shot (Fisher, with or without labels).
        epochs: epochs of fine-tuning with the dense network as teacher; a trial of settings comes on top.
        rehearsal: training in which a portfolio of plans is compared, all together, as a share of the epochs of the
            fine-tune; 0 trusts the measured losses.
        gates: let gates make one more candidate of the best plan that was rehearsed, in a third of the epochs of the
            fine-tune on top (`sluice.pipeline.gate_candidate`).
        lr: learning rate of the fine-tune and the rehearsal; ``"auto"`` finds it by trial on held-out batches, and with
            it loss and parametrisation (`sluice.training.trial`). Gates train at it too, with ``"auto"`` at 1e-3.
        recovery: in place of ``lr``: rate, optimizer, weight decay, warm-up, schedule, parametrisation.
        loss: a function of (outputs, teacher's outputs, labels or None), or of (outputs, labels), to a scalar tensor,
            or the name of a ready one (`sluice.training.losses`): ``cross-entropy`` (of (N, classes, ...)), ``bce``,
            ``mse``, ``cosine``, ``logits``. The default is for logits of classes (N, classes): distillation, and
            cross-entropy where there are labels; no other is tried beside a given one.
        evaluate: figure of merit of a module, a number, for the report; the higher the better where a drop is allowed.
            It is called once before anything is measured.
        minutes: of profiling; afterwards points that a plan needs are estimated, and the report says how much.
    Raises:
        SluiceError: a mistake that the caller can mend; no half-written file is left behind.
    """
    started = time.perf_counter()
    methods, exclude = check_methods(methods), patterns(exclude)
    asked = parse_budget(budget)  # a mistake in an argument is an error before anything is measured
    deployment = Deployment(target, batch, threads, precision)
    check_paths(table=table, **({} if out is None else {"out": out}))
    recipe = recipe_of(
        model, example_inputs, data, loss=loss, lr=lr, recovery=recovery, gate_epochs=gate_epochs, epochs=epochs,
        rehearsal=rehearsal, evaluate=evaluate, minutes=minutes, progress=progress, gates=gates,
    )  # fmt: skip
    if out is not None:
        check_writable(out, room_for(model), {"the latency table": table})
    if isinstance(asked, AllowedDrop):
        check_least(asked, recipe)
    fixed = [asked] if isinstance(asked, BudgetSpec) else []
    ready = prepare(model, example_inputs, fixed, deployment, recipe, table=table, exclude=exclude, methods=methods,
                    minutes=minutes)  # fmt: skip
    if isinstance(asked, AllowedDrop):
        return find_least(ready, asked, recipe, partial(_finish, ready, recipe=recipe, started=started), out=out)
    return _finish(ready, asked, recipe, out=out, started=started)


def sweep(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budgets: Sequence[str],
    data: Data,
    table: str | os.PathLike[str] = ":memory:",
    out: str | os.PathLike[str] | None = None,
    batch: int = 1,
    target: str = "ort-cpu",
    threads: int = 1,
    precision: str = "fp32",
    exclude: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    epochs: int = 10,
    rehearsal: float = REHEARSAL,
    gates: bool = False,
    lr: Rate = AUTO,
    recovery: Recovery | None = None,
    loss: Loss | str | None = None,
    evaluate: Evaluate | None = None,
    minutes: float = math.inf,
    progress: bool = True,
) -> Iterator[tuple[str, Compressed]]:
    """`compress` for several budgets, one after the other: every choice is priced once, and no point measured twice.

    No gates are trained before the prices, since these serve all budgets. Arguments and errors are those of `compress`.
    The first budget that fails ends the sweep; a budget out of reach is an error before anything is priced. The folder
    ``out/<budget without its %>`` holds the files of a budget.
    """
    methods, exclude = check_methods(methods), patterns(exclude)
    if not budgets:
        raise SluiceError("there are no budgets; give at least one, budgets=['50%']")
    asked = {budget: BudgetSpec.parse(budget) for budget in budgets}
    deployment = Deployment(target, batch, threads, precision)
    check_paths(table=table, **({} if out is None else {"out": out}))
    recipe = recipe_of(
        model, example_inputs, data, loss=loss, lr=lr, recovery=recovery, gate_epochs=0, epochs=epochs,
        rehearsal=rehearsal, evaluate=evaluate, minutes=minutes, progress=progress, gates=gates,
    )  # fmt: skip
    folders = {budget: None if out is None else Path(out) / budget.strip().removesuffix("%") for budget in budgets}
    for folder in folders.values():
        if folder is not None:
            check_writable(folder, room_for(model), {"the latency table": table})
    ready = prepare(model, example_inputs, list(asked.values()), deployment, recipe, table=table, exclude=exclude,
                    methods=methods, minutes=minutes)  # fmt: skip
    for budget, folder in folders.items():
        started = time.perf_counter()
        yield budget, _finish(ready, asked[budget], recipe, out=folder, started=started)


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
    return _finish(ready, budget.target, recipe, out=out, started=time.perf_counter())


def _finish(
    ready: Prepared, budget: BudgetSpec, recipe: Recipe, *, out: str | os.PathLike[str] | None, started: float
) -> Compressed:
    budget = counted_from(ready.plain, budget)
    gated, measured, reference = ready.gated, ready.measured, ready.teacher
    problem, precision = ready.problem, measured.fingerprint.precision
    data, evaluate, progress = recipe.data, recipe.evaluate, recipe.progress
    if precision == "int8" and data is None:
        raise SluiceError("int8 is calibrated on data; give data= some batches of inputs")
    stripped = ready.captured()
    scenarios: list[Scenario] = []
    if data is not None and recipe.epochs:
        target_ms = AIM * budget.ms(measured.latency.dense_ms())
        target_ms, total = max(target_ms, problem.least_from(target_ms)), recipe.steps()
        candidate = GateCandidate(
            stripped, gated.meta["space"], ready.methods, reference, recipe.loss, recipe.recovery, progress
        )  # fmt: skip
        scenarios = choose(
            problem, ready.methods, target_ms, lambda solution: trainable(stripped, solution.plan),
            data=data, teacher=reference, loss=recipe.loss, recovery=recipe.recovery,
            steps=int(recipe.rehearsal * total), total=total, gates=candidate if recipe.gates else None,
            progress=progress,
        )  # fmt: skip
    with stage("decide and verify on engines", progress) as advance:
        dense_onnx = ready.dense_onnx(stripped)
        rehearsed = {s.problem: s.solution for s in reversed(scenarios)}
        verified = first_verified([*(s.problem for s in scenarios), problem], budget, dense_onnx, advance, rehearsed)
    slim = trainable(stripped, verified.plan)
    cut = finalize(rewrite_onnx(dense_onnx, verified.plan))
    closed = parity(close(gated, verified.solution).eval(), slim, cut, stripped)
    _same(closed)

    def deploy(model: onnx.ModelProto) -> tuple[onnx.ModelProto, float | None]:
        if precision == "fp32":
            return measured.engine(model), None
        batches = None if data is None else _first(data, CALIBRATION)
        made = deploy_onnx(model, precision, batches, target=measured.target)
        return made, None if evaluate is None else evaluate(as_module(made, example_outputs(slim, stripped)))

    deploy(cut)  # rule 4
    metric_dense = ready.metric if evaluate is None or ready.metric is not None else evaluate(reference)
    recovered = recover(slim, verified.plan, recipe, dense=stripped, teacher=reference)
    slim = merge_runs(slim, verified.plan).eval()
    with kept(out, slim, verified.plan):
        with stage("export and measure", progress) as advance:
            slim_onnx = finalize(to_onnx(slim, captured_inputs(stripped)))
            dense_engine = finalize(dense_onnx)
            deployed, metric_deployed = deploy(slim_onnx)
            file = deployed if precision == "fp32" else slim_onnx
            exported = parity(slim, slim, file, stripped)
            times = final_pair(measured, measured.engine(dense_engine), deployed, budget, verified, advance)
        report = make_report(
            measured, verified, times=times, worst=max(closed, exported),
            params=(count_parameters(stripped), count_parameters(slim)),
            macs=(count_macs(dense_engine), count_macs(slim_onnx)),
            metrics=(metric_dense, None if evaluate is None else evaluate(slim), metric_deployed),
            frozen={**measured.space.left_alone, **gated.meta["space"].left_alone},
            seconds=time.perf_counter() - started, losses=ready.problem.losses, plain=ready.plain,
            readings=[(s.name, s.solution.choice.promised_ms, s.rehearsed) for s in scenarios], recovery=recovered,
            methods=("rank",) if ready.methods == (BSR,) else ready.methods,
        )  # fmt: skip
        origin = provenance(verified.plan, report)
        named, deployed = labelled(file, origin), labelled(deployed, origin)
        done = Compressed(with_own_names(slim), verified.plan, named, deployed, report)
        if out is not None:
            done.save(out)
    _same(exported)  # last: the trained network is saved even then
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
