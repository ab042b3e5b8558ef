"""One model's whole way: check what is asked, prepare the problem once, carry it out for a budget, several, or a drop.

Preparing is `sluice.pipeline.prepare`, the rest `sluice.pipeline.finish`. With an output folder every stage is kept
until the result is saved, so the same command goes on where it was interrupted (`sluice.training.stages`). With a seed
and one thread it comes to the same bits.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from sluice.artifacts.folder import check_writable
from sluice.artifacts.result import Compressed
from sluice.core.budget_spec import AllowedDrop, BudgetSpec, parse_budget
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.passes.graph.capture import Inputs
from sluice.passes.graph.width_limits import WidthLimits
from sluice.pipeline.arguments import check_paths, patterns, recipe_of, room_for, stages_of
from sluice.pipeline.finish import carry_out
from sluice.pipeline.least import check_least, find_least
from sluice.pipeline.prepare import prepare
from sluice.pipeline.recipe import REHEARSAL, Evaluate
from sluice.solver.options import METHODS, check_methods
from sluice.training.recovery import AUTO, Rate, Recovery
from sluice.training.stages import seeded
from sluice.training.train import Data, Loss

__all__ = ["Compressed", "compress", "sweep"]


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
    exclude: Sequence[str | type[nn.Module]] = (),
    keep: Mapping[str, float] | None = None,
    multiple: Mapping[str, int] | None = None,
    methods: Sequence[str] = METHODS,
    gate_epochs: int = 0,
    epochs: int = 10,
    rehearsal: float = REHEARSAL,
    gates: bool = False,
    progressive: bool = False,
    rotate: bool = False,
    lr: Rate = AUTO,
    recovery: Recovery | None = None,
    loss: Loss | str | None = None,
    evaluate: Evaluate | None = None,
    minutes: float = math.inf,
    seed: int | None = None,
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
        exclude: layers to leave alone: names, shell patterns, classes of modules, or ``"type:LayerNorm"``.
        keep: by pattern the least share of the channels, a float, or number of them, an int, ``{"head.*": 0.5}``.
        multiple: by pattern what widths are multiples of, ``{"*": 8}``.
        methods: some of ``filter``, ``rank``, ``block``, ``merge``; the edits on offer.
        gate_epochs: epochs of training with gates; 0 scores channels in one shot (Fisher, with or without labels).
        epochs: epochs of fine-tuning with the dense network as teacher; a trial of settings comes on top.
        rehearsal: training in which a portfolio of plans is compared, all together, as a share of the epochs of the
            fine-tune; 0 trusts the measured losses.
        gates: let gates make one more candidate of the best plan that was rehearsed, in a third of the epochs of the
            fine-tune on top (`sluice.pipeline.gate_candidate`).
        progressive: let a network that comes down to a budget below about a third of the dense latency in stops, with
            training and prices anew at each, make one more candidate, in as many epochs as gates
            (`sluice.pipeline.progressive`).
        rotate: first write attention in a basis that sorts the dimensions of its heads, and value biases as constants,
            which computes the same (`sluice.passes.cut.rotate_torch`). These dimensions are widths then, as heads are.
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
        seed: of the random numbers of torch, numpy and Python meanwhile; those of the caller go on afterwards.
    Raises:
        SluiceError: a mistake that the caller can mend; no half-written file is left behind.
    """
    started = time.perf_counter()
    methods, exclude = check_methods(methods), patterns(exclude, model)
    limits = WidthLimits(keep or {}, multiple or {})
    asked = parse_budget(budget)  # a mistake in an argument is an error before anything is measured
    deployment = Deployment(target, batch, threads, precision)
    check_paths(table=table, **({} if out is None else {"out": out}))
    recipe = recipe_of(
        model, example_inputs, data, loss=loss, lr=lr, recovery=recovery, gate_epochs=gate_epochs, epochs=epochs,
        rehearsal=rehearsal, evaluate=evaluate, minutes=minutes, progress=progress, gates=gates,
        progressive=progressive, rotate=rotate,
    )  # fmt: skip
    if out is not None:
        check_writable(out, room_for(model), {"the latency table": table})
    if isinstance(asked, AllowedDrop):
        check_least(asked, recipe)
    fixed = [asked] if isinstance(asked, BudgetSpec) else []
    more = (deployment, methods, exclude, limits, seed)
    recipe = replace(recipe, stages=stages_of(model, example_inputs, out, recipe, *more))
    with seeded(seed):
        ready = prepare(model, example_inputs, fixed, deployment, recipe, table=table, exclude=exclude, methods=methods,
                        limits=limits, minutes=minutes)  # fmt: skip
        if isinstance(asked, AllowedDrop):
            return find_least(ready, asked, recipe, partial(carry_out, ready, recipe=recipe, started=started), out=out)
        return carry_out(ready, asked, recipe, out=out, started=started)


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
    exclude: Sequence[str | type[nn.Module]] = (),
    keep: Mapping[str, float] | None = None,
    multiple: Mapping[str, int] | None = None,
    methods: Sequence[str] = METHODS,
    epochs: int = 10,
    rehearsal: float = REHEARSAL,
    gates: bool = False,
    progressive: bool = False,
    rotate: bool = False,
    lr: Rate = AUTO,
    recovery: Recovery | None = None,
    loss: Loss | str | None = None,
    evaluate: Evaluate | None = None,
    minutes: float = math.inf,
    seed: int | None = None,
    progress: bool = True,
) -> Iterator[tuple[str, Compressed]]:
    """`compress` for several budgets, one after the other: every choice is priced once, and no point measured twice.

    No gates are trained before the prices, since these serve all budgets. Arguments and errors are those of `compress`.
    The first budget that fails ends the sweep; a budget out of reach is an error before anything is priced. The folder
    ``out/<budget without its %>`` holds the files of a budget.
    """
    methods, exclude = check_methods(methods), patterns(exclude, model)
    limits = WidthLimits(keep or {}, multiple or {})
    if not budgets:
        raise SluiceError("there are no budgets; give at least one, budgets=['50%']")
    asked = {budget: BudgetSpec.parse(budget) for budget in budgets}
    deployment = Deployment(target, batch, threads, precision)
    check_paths(table=table, **({} if out is None else {"out": out}))
    recipe = recipe_of(
        model, example_inputs, data, loss=loss, lr=lr, recovery=recovery, gate_epochs=0, epochs=epochs,
        rehearsal=rehearsal, evaluate=evaluate, minutes=minutes, progress=progress, gates=gates,
        progressive=progressive, rotate=rotate,
    )  # fmt: skip
    folders = {budget: None if out is None else Path(out) / budget.strip().removesuffix("%") for budget in budgets}
    for folder in folders.values():
        if folder is not None:
            check_writable(folder, room_for(model), {"the latency table": table})
    more = (deployment, methods, exclude, limits, seed)
    whole = replace(recipe, stages=stages_of(model, example_inputs, out, recipe, *more))
    with seeded(seed):
        ready = prepare(model, example_inputs, list(asked.values()), deployment, whole, table=table, exclude=exclude,
                        methods=methods, limits=limits, minutes=minutes)  # fmt: skip
    for budget, folder in folders.items():
        started = time.perf_counter()
        stages = stages_of(model, example_inputs, folder, recipe, *more)
        with seeded(seed):
            done = carry_out(ready, asked[budget], replace(recipe, stages=stages), out=folder, started=started)
        yield budget, done
    whole.stages.end()
