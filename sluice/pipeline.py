"""The whole arc: profile, learn gates, decide and verify, close, cut, fine-tune, export, measure, report.

1. Everything is decided and its engine measured *before* fine-tuning, since latency does not depend on the weights.
2. Closing and cutting are exact; their parity (closed = slim torch = slim ONNX) is part of the report. Accuracy changes
   only in the two training stages and in the decision between them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from torch import fx, nn

from sluice.budget import Budget, parse_budget
from sluice.choose import Reading, ask, choose
from sluice.closing import close
from sluice.errors import SluiceError
from sluice.files import write_atomically
from sluice.macs import count_macs
from sluice.onnx_file import finalize, save_onnx
from sluice.outcome import captured_inputs, count_parameters, make_report, parity
from sluice.passes.capture import Inputs
from sluice.passes.decide import least_ms
from sluice.passes.export import to_onnx
from sluice.passes.gating import Gated, strip_gates
from sluice.passes.importance import learned_scores
from sluice.passes.options import METHODS, check_methods
from sluice.passes.rewrite_onnx import rewrite_onnx
from sluice.passes.rewrite_torch import merge_runs, rewrite_torch
from sluice.plan import Plan
from sluice.prepare import Ready, check_precision, prepare
from sluice.profiler.profile import Profile
from sluice.report import Report
from sluice.stages import stage
from sluice.store import save_weights
from sluice.train import Data, Loss, check_data, default_loss, fit
from sluice.verify import AIM, Question, Settled, measure_pair, settle

__all__ = ["Compressed", "compress", "finish", "sweep"]

Evaluate = Callable[[nn.Module], float]
PARITY = 1e-4  # relative; beyond this a rewrite has changed the function, and that is our fault


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """The slim network, how it was cut, its deployment file and the figures."""

    module: fx.GraphModule
    plan: Plan
    onnx: onnx.ModelProto
    report: Report

    def save(self, folder: str | os.PathLike[str]) -> None:
        """``plan.json``, ``slim.safetensors``, ``slim.onnx`` and ``report.json`` in ``folder``."""
        _claim(folder)
        # Made aside and moved when all are complete: a full disk must not leave one plan's weights beside another's.
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".part") as part:
                draft = Path(part)
                self.plan.save(draft / "plan.json")
                save_weights(self.module, draft / "slim.safetensors")
                save_onnx(self.onnx, draft / "slim.onnx")
                self.report.save(draft / "report.json")
                for file in sorted(draft.iterdir()):
                    os.replace(file, Path(folder) / file.name)
        except OSError as error:
            raise SluiceError(f"cannot write to {os.fspath(folder)!r}: {error}; choose another folder") from error


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
    exclude: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    gate_epochs: int = 0,
    epochs: int = 10,
    rehearsal: int = 40,
    lr: float = 1e-3,
    loss: Loss = default_loss,
    evaluate: Evaluate | None = None,
    progress: bool = True,
) -> Compressed:
    """Make ``model`` fit a measured latency budget.

    Args:
        model: trained network; not changed.
        example_inputs: tensor, tuple or mapping; axis 0 is the batch.
        budget: ``"50%"`` of the dense latency, ``"2.4ms"`` or ``{"latency_ms": 2.4}``, at ``batch`` on ``target``.
        data: re-iterable batches, ``(inputs, labels)`` or inputs alone.
        table: latency table (SQLite), made or continued.
        out: folder for plan, weights, ONNX and report.
        methods: what may be done to the network, of ``filter``, ``rank``, ``block``, ``merge``.
        gate_epochs: epochs of training with gates; 0 scores channels in one shot (Fisher, with or without labels).
        epochs: epochs of fine-tuning with the dense network as teacher.
        rehearsal: training steps after which plans are first compared; 0 takes the solver's word.
        evaluate: figure of merit of a module, for the report.
    Raises:
        SluiceError: anything the caller can mend; nothing half-written is left behind.
    """
    started = time.perf_counter()
    methods = check_methods(methods)
    parse_budget(budget, 1.0)  # a typing error is said before anything is measured, and so is the rest of these
    _check_rehearsal(rehearsal)
    check_precision(model)
    check_data(model, data, loss=loss)
    if out is not None:
        _claim(out)
    ready = prepare(
        model, example_inputs, budget=budget, data=data, table=table, batch=batch, target=target, threads=threads,
        exclude=exclude, methods=methods, gate_epochs=gate_epochs, lr=lr, loss=loss, progress=progress,
    )  # fmt: skip
    return _finish(
        ready, budget, data=data, epochs=epochs, rehearsal=rehearsal, lr=lr, loss=loss, evaluate=evaluate, out=out,
        progress=progress, started=started,
    )  # fmt: skip


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
    exclude: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    epochs: int = 10,
    rehearsal: int = 40,
    lr: float = 1e-3,
    loss: Loss = default_loss,
    evaluate: Evaluate | None = None,
    progress: bool = True,
) -> Iterator[tuple[str, Compressed]]:
    """`compress` for several budgets, one after the other: the network is profiled and every choice priced only once.

    No gates are trained, since those would be trained for one budget. Arguments and errors are those of `compress`;
    ``out/<budget without its %>`` holds the files of a budget.
    """
    methods = check_methods(methods)
    for budget in budgets:
        parse_budget(budget, 1.0)
    _check_rehearsal(rehearsal)
    check_precision(model)
    check_data(model, data, loss=loss)
    folders = {budget: None if out is None else Path(out) / budget.strip().removesuffix("%") for budget in budgets}
    for folder in folders.values():
        if folder is not None:
            _claim(folder)
    ready = prepare(
        model, example_inputs, budget=min(budgets, key=lambda b: parse_budget(b, 1.0)), data=data, table=table,
        batch=batch, target=target, threads=threads, exclude=exclude, methods=methods, gate_epochs=0, lr=lr, loss=loss,
        progress=progress,
    )  # fmt: skip
    for budget, folder in folders.items():
        started = time.perf_counter()
        yield budget, _finish(
            ready, budget, data=data, epochs=epochs, rehearsal=rehearsal, lr=lr, loss=loss, evaluate=evaluate,
            out=folder, progress=progress, started=started,
        )  # fmt: skip


def finish(
    gated: Gated,
    budget: Budget,
    *,
    methods: Sequence[str] = ("filter",),
    importance: Mapping[str, np.ndarray] | None = None,
    teacher: nn.Module | None = None,
    data: Data | None = None,
    epochs: int = 0,
    rehearsal: int = 40,
    lr: float = 1e-3,
    loss: Loss = default_loss,
    evaluate: Evaluate | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Compressed:
    """Decide, verify on the engine, close, cut, fine-tune, export, measure, report.

    Args:
        gated: trained gated network.
        budget: made with a profile (not a bare latency model: the engine has to be measured).
        methods: what may be done, of those the budget's profile was made for; all but ``filter`` need ``data``.
        importance: scores by group; those the gates collected if not given.
        teacher: dense network, for fine-tuning (``epochs`` over ``data``) and as the report's reference.
    """
    if budget.profile is None:
        raise SluiceError("this budget has no profile, so no engine can be measured; make it from sluice.profile(...)")
    methods = check_methods(methods)
    given = importance if importance is not None else {}
    scores = learned_scores(gated.gates) if importance is None and "filter" in methods else given
    question = ask(gated, budget.profile, methods, scores, data=data, loss=loss)
    reference = teacher if teacher is not None else strip_gates(gated, thresholded=True).eval()
    return _finish(
        Ready(gated, budget.profile, methods, reference, question), budget.target, data=data, epochs=epochs,
        rehearsal=rehearsal, lr=lr, loss=loss, evaluate=evaluate, out=out, progress=progress,
        started=time.perf_counter(),
    )  # fmt: skip


def _finish(
    ready: Ready, budget: str | Mapping[str, str | float], *, data: Data | None, epochs: int, rehearsal: int,
    lr: float, loss: Loss, evaluate: Evaluate | None, out: str | os.PathLike[str] | None, progress: bool,
    started: float,
) -> Compressed:  # fmt: skip
    gated, measured, methods, reference = ready.gated, ready.measured, ready.methods, ready.teacher
    question = ready.question
    stripped = strip_gates(gated, thresholded=True).eval()
    inputs = captured_inputs(stripped)
    readings: list[Reading] = []
    if data is not None and epochs:
        least = least_ms(question.model).promised_ms
        target_ms = max(AIM * parse_budget(budget, measured.latency.dense_ms()), least)
        readings = choose(
            question, methods, target_ms, lambda answer: rewrite_torch(stripped, answer.plan, inputs, merged=False),
            data=data, teacher=reference, loss=loss, lr=lr, steps=rehearsal, progress=progress,
        )  # fmt: skip
    with stage("decide and verify on engines", progress):
        dense_onnx = to_onnx(stripped, inputs)
        settled = _settle([*(r.question for r in readings), question], budget, dense_onnx)
    slim = rewrite_torch(stripped, settled.plan, inputs, merged=False).eval()
    closed = parity(
        close(gated, settled.answer).eval(),
        slim,
        finalize(rewrite_onnx(dense_onnx, settled.plan)),
        stripped,
        measured,
    )
    _same(closed)
    if epochs and data is not None:
        fit(slim, data, epochs=epochs, teacher=reference, loss=loss, lr=lr, progress=progress, name="fine-tune")
    slim = merge_runs(slim, settled.plan).eval()
    with stage("export and measure", progress):
        slim_onnx = finalize(to_onnx(slim, inputs))
        exported = parity(slim, slim, slim_onnx, stripped, measured)
        dense_engine = finalize(dense_onnx)
        dense_ms, slim_ms = _final_pair(measured, dense_engine, slim_onnx, budget)
    report = make_report(
        measured, settled, dense_ms=dense_ms, slim_ms=slim_ms, worst=max(closed, exported),
        budget_ms=parse_budget(budget, dense_ms),
        params=(count_parameters(stripped), count_parameters(slim)),
        macs=(count_macs(dense_engine), count_macs(slim_onnx)),
        metrics=(None, None) if evaluate is None else (evaluate(reference), evaluate(slim)),
        frozen=gated.meta["analysis"].frozen, seconds=time.perf_counter() - started, losses=ready.question.losses,
        readings=[(r.name, r.answer.choice.promised_ms, r.rehearsed) for r in readings],
    )  # fmt: skip
    done = Compressed(slim, settled.plan, slim_onnx, report)
    if out is not None:
        done.save(out)
    _same(exported)  # last: what was trained is saved even then
    return done


def _settle(questions: Sequence[Question], budget: str | Mapping[str, str | float], dense: onnx.ModelProto) -> Settled:
    """The first question that has an engine within the budget: what trained best may just not be fast enough."""
    for question in questions[:-1]:
        try:
            return settle(question, budget, dense)
        except SluiceError:
            continue
    return settle(questions[-1], budget, dense)


def _final_pair(
    measured: Profile, dense: onnx.ModelProto, slim: onnx.ModelProto, budget: str | Mapping[str, str | float]
) -> tuple[float, float]:
    """Milliseconds of both engines; where a first measurement says that the budget is missed, the median of three."""
    pairs = [measure_pair(measured, dense, slim, seed=99)]
    if pairs[0][1] > parse_budget(budget, pairs[0][0]):
        pairs += [measure_pair(measured, dense, slim, seed=seed) for seed in (100, 101)]
    return sorted(pairs, key=lambda pair: pair[1] / pair[0])[len(pairs) // 2]


def _check_rehearsal(steps: int) -> None:
    if steps < 0:
        raise SluiceError(f"rehearsal={steps}: give the number of training steps, or 0 for no rehearsal")


def _same(worst: float) -> None:
    if worst > PARITY:
        raise AssertionError(f"two forms of the slim network differ by {worst:.2e} of the output's scale")


def _claim(folder: str | os.PathLike[str]) -> None:
    """Make the folder, and make sure that it can be written to."""
    probe = Path(folder) / ".probe"
    write_atomically(probe, b"")
    probe.unlink()
