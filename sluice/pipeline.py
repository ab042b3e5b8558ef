"""The whole arc: profile, learn gates, decide and verify, close, cut, fine-tune, export, measure, report.

1. Everything is decided and its engine measured *before* fine-tuning, since latency does not depend on the weights.
2. Closing and cutting are exact; their parity (closed = slim torch = slim ONNX) is part of the report. Accuracy changes
   only in the two training stages and in the decision between them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import fx, nn

from sluice.budget import Budget, parse_budget
from sluice.errors import SluiceError
from sluice.files import write_atomically
from sluice.macs import count_macs
from sluice.onnx_file import finalize, save_onnx
from sluice.outcome import captured_inputs, count_parameters, make_report, parity
from sluice.passes.capture import Inputs
from sluice.passes.decide import decide
from sluice.passes.export import to_onnx
from sluice.passes.gating import Gated, close_gates, insert_gates, strip_gates
from sluice.passes.importance import fisher_scores, learned_scores
from sluice.passes.resolve import make_plan
from sluice.passes.rewrite_onnx import rewrite_onnx
from sluice.passes.rewrite_torch import rewrite_torch
from sluice.plan import Plan
from sluice.profiler.profile import Profile, profile_onnx
from sluice.report import Report
from sluice.stages import stage
from sluice.store import input_specs, save_weights
from sluice.train import Data, Loss, check_data, default_loss, fit
from sluice.verify import measure_pair, settle

__all__ = ["Compressed", "Proposal", "compress", "finish", "profile", "propose"]

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


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan made without training, and what it promises; ``retained`` is the kept share of the importance."""

    plan: Plan
    budget_ms: float
    dense_ms: float
    promised_ms: float
    retained: float


def profile(
    model: nn.Module,
    example_inputs: Inputs,
    table: str | os.PathLike[str] = ":memory:",
    *,
    batch: int = 1,
    target: str = "ort-cpu",
    threads: int = 1,
    exclude: Sequence[str] = (),
    progress: bool = True,
) -> Profile:
    """Measure, on this device, what ``table`` does not know yet about the model; see `sluice.profiler.profile_onnx`."""
    check_precision(model)
    with stage("export", progress):
        dense = to_onnx(model, example_inputs)
    return profile_onnx(dense, table, batch=batch, target=target, threads=threads, exclude=exclude, progress=progress)


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
    gate_epochs: int = 4,
    epochs: int = 10,
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
        gate_epochs: epochs of training with gates; 0 decides in one shot from Fisher scores.
        epochs: epochs of fine-tuning with the dense network as teacher.
        evaluate: figure of merit of a module, for the report.
    Raises:
        SluiceError: anything the caller can mend; nothing half-written is left behind.
    """
    started = time.perf_counter()
    parse_budget(budget, 1.0)  # a typing error is said before anything is measured, and so is the rest of these
    check_precision(model)
    check_data(model, data, labels=not gate_epochs and loss is default_loss, loss=loss)
    if out is not None:
        _claim(out)
    with stage("export", progress):
        dense_onnx = to_onnx(model, example_inputs)
    measured = profile_onnx(
        dense_onnx, table, batch=batch, target=target, threads=threads, exclude=exclude, progress=progress
    )
    steps = max(1, gate_epochs * _length(data))
    gated = insert_gates(model, example_inputs, steps=steps, exclude=exclude)
    held = Budget(gated, measured, budget)  # says at once if it cannot be met
    teacher = strip_gates(gated).eval()
    if gate_epochs:
        fit(
            gated,
            data,
            epochs=gate_epochs,
            teacher=teacher,
            budget=held,
            loss=loss,
            lr=lr,
            progress=progress,
            name="gates",
        )
        importance = learned_scores(gated.gates)
    else:
        importance = fisher_scores(gated, data, teacher=None if loss is default_loss else teacher, loss=loss)
    return finish(
        gated, held, importance=importance, teacher=teacher, data=data, epochs=epochs, lr=lr, loss=loss,
        evaluate=evaluate, out=out, progress=progress, started=started,
    )  # fmt: skip


def propose(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budget: str | Mapping[str, str | float],
    data: Data,
    table: str | os.PathLike[str] = ":memory:",
    batch: int = 1,
    target: str = "ort-cpu",
    threads: int = 1,
    exclude: Sequence[str] = (),
    progress: bool = True,
) -> Proposal:
    """A plan in one shot: Fisher scores on a few labelled batches of ``data``, then the solver; nothing is trained.

    Arguments and errors are those of `compress`. With a table that knows the model this takes seconds.
    """
    parse_budget(budget, 1.0)
    check_data(model, data, labels=True)
    measured = profile(
        model, example_inputs, table, batch=batch, target=target, threads=threads, exclude=exclude, progress=progress
    )
    gated = insert_gates(model, example_inputs, exclude=exclude)
    target_ms = Budget(gated, measured, budget).target_ms
    scores = fisher_scores(gated, data)
    choice = decide(measured.latency, scores, target_ms)
    plan = make_plan(gated.meta["analysis"], choice.kept(scores), input_specs(gated))
    return Proposal(plan, target_ms, measured.latency.dense_ms(), choice.promised_ms, choice.retained)


def finish(
    gated: Gated,
    budget: Budget,
    *,
    importance: Mapping[str, np.ndarray] | None = None,
    teacher: nn.Module | None = None,
    data: Data | None = None,
    epochs: int = 0,
    lr: float = 1e-3,
    loss: Loss = default_loss,
    evaluate: Evaluate | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    started: float | None = None,
) -> Compressed:
    """Decide, verify on the engine, close, cut, fine-tune, export, measure, report.

    Args:
        gated: trained gated network.
        budget: made with a profile (not a bare latency model: the engine has to be measured).
        importance: scores by group; those the gates collected if not given.
        teacher: dense network, for fine-tuning (``epochs`` over ``data``) and as the report's reference.
    """
    started = time.perf_counter() if started is None else started
    measured = budget.profile
    if measured is None:
        raise SluiceError("this budget has no profile, so no engine can be measured; make it from sluice.profile(...)")
    scores = importance if importance is not None else learned_scores(gated.gates)
    stripped = strip_gates(gated).eval()
    reference = teacher if teacher is not None else stripped
    with stage("decide and verify on engines", progress):
        dense_onnx = to_onnx(stripped, captured_inputs(stripped))
        settled = settle(measured, gated.meta["analysis"], scores, budget.target, dense_onnx, input_specs(stripped))
    slim = rewrite_torch(stripped, settled.plan, captured_inputs(stripped)).eval()
    closed = parity(
        close_gates(gated, settled.kept).eval(),
        slim,
        finalize(rewrite_onnx(dense_onnx, settled.plan)),
        stripped,
        measured,
    )
    _same(closed)
    if epochs and data is not None:
        fit(slim, data, epochs=epochs, teacher=reference, loss=loss, lr=lr, progress=progress, name="fine-tune")
    with stage("export and measure", progress):
        slim_onnx = finalize(to_onnx(slim, captured_inputs(stripped)))
        exported = parity(slim, slim, slim_onnx, stripped, measured)
        dense_engine = finalize(dense_onnx)
        dense_ms, slim_ms = measure_pair(measured, dense_engine, slim_onnx, seed=99)
    report = make_report(
        measured, settled, dense_ms=dense_ms, slim_ms=slim_ms, worst=max(closed, exported), budget=budget,
        params=(count_parameters(stripped), count_parameters(slim)),
        macs=(count_macs(dense_engine), count_macs(slim_onnx)),
        metrics=(None, None) if evaluate is None else (evaluate(reference), evaluate(slim)),
        frozen=gated.meta["analysis"].frozen, seconds=time.perf_counter() - started,
    )  # fmt: skip
    done = Compressed(slim, settled.plan, slim_onnx, report)
    if out is not None:
        done.save(out)
    _same(exported)  # last: what was trained is saved even then
    return done


def check_precision(model: nn.Module) -> None:
    """Only float32 is measured so far."""
    for name, tensor in model.named_parameters():
        if tensor.dtype != torch.float32:
            raise SluiceError(
                f"parameter {name!r} is {tensor.dtype}, only float32 is supported so far; call model.float()"
            )


def _same(worst: float) -> None:
    if worst > PARITY:
        raise AssertionError(f"two forms of the slim network differ by {worst:.2e} of the output's scale")


def _claim(folder: str | os.PathLike[str]) -> None:
    """Make the folder, and make sure that it can be written to."""
    probe = Path(folder) / ".probe"
    write_atomically(probe, b"")
    probe.unlink()


def _length(data: Data) -> int:
    return len(data) if hasattr(data, "__len__") else sum(1 for _ in data)  # type: ignore[arg-type]
