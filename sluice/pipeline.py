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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sluice.budget import Budget, parse_budget
from sluice.errors import SluiceError
from sluice.files import write_atomically
from sluice.macs import count_macs
from sluice.onnx_file import finalize, save_onnx
from sluice.passes.capture import MARK, Inputs, normalize_inputs
from sluice.passes.decide import decide
from sluice.passes.export import to_onnx
from sluice.passes.gating import Gated, close_gates, insert_gates, strip_gates
from sluice.passes.importance import fisher_scores, learned_scores
from sluice.passes.resolve import make_plan
from sluice.passes.rewrite_onnx import rewrite_onnx
from sluice.passes.rewrite_torch import rewrite_torch
from sluice.plan import Plan
from sluice.profiler.profile import Profile, profile_onnx
from sluice.report import GroupRow, PieceRow, Report
from sluice.runtime.compare import relative_error
from sluice.store import input_specs, save_weights
from sluice.train import Data, Loss, check_data, default_loss, fit
from sluice.verify import Settled, measure_pair, settle

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
    dense_onnx = to_onnx(stripped, _inputs(stripped))
    settled = settle(measured, gated.meta["analysis"], scores, budget.target, dense_onnx, input_specs(stripped))
    slim = rewrite_torch(stripped, settled.plan, _inputs(stripped)).eval()
    parity = _parity(
        close_gates(gated, settled.kept).eval(),
        slim,
        finalize(rewrite_onnx(dense_onnx, settled.plan)),
        stripped,
        measured,
    )
    _same(parity)
    if epochs and data is not None:
        fit(slim, data, epochs=epochs, teacher=reference, loss=loss, lr=lr, progress=progress, name="fine-tune")
    slim_onnx = finalize(to_onnx(slim, _inputs(stripped)))
    exported = _parity(slim, slim, slim_onnx, stripped, measured)
    dense_engine = finalize(dense_onnx)
    pairs = [measure_pair(measured, dense_engine, slim_onnx, seed=seed) for seed in (97, 98, 99)]
    dense_ms, slim_ms = sorted(pairs, key=lambda pair: pair[1] / pair[0])[1]  # the median share of dense
    report = _report(
        measured, settled, dense_ms=dense_ms, slim_ms=slim_ms, parity=max(parity, exported), budget=budget,
        params=(_parameters(stripped), _parameters(slim)), macs=(count_macs(dense_engine), count_macs(slim_onnx)),
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


def _inputs(gm: fx.GraphModule) -> Inputs:
    mark = gm.meta[MARK]
    return mark["kwargs"] if mark["kwargs"] else mark["args"]


def _length(data: Data) -> int:
    return len(data) if hasattr(data, "__len__") else sum(1 for _ in data)  # type: ignore[arg-type]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _parity(
    closed: nn.Module, slim: nn.Module, engine: onnx.ModelProto, captured: fx.GraphModule, measured: Profile
) -> float:
    """Largest relative difference between closed, slim torch and slim ONNX on the example inputs."""
    args, kwargs = normalize_inputs(_inputs(captured))
    with torch.no_grad():
        want = [t.cpu().numpy() for t in pytree.tree_leaves(closed(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        have = [t.cpu().numpy() for t in pytree.tree_leaves(slim(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    feeds = {info.name: t.cpu().numpy() for info, t in zip(engine.graph.input, tensors, strict=True)}
    outputs = list(measured.runner().build(engine).run(feeds).values())
    return max(max(relative_error(h, w), relative_error(o, w)) for h, o, w in zip(have, outputs, want, strict=True))


def _report(
    measured: Profile, settled: Settled, *, dense_ms: float, slim_ms: float, parity: float, budget: Budget,
    params: tuple[int, int], macs: tuple[int, int], metrics: tuple[float | None, float | None],
    frozen: Mapping[str, str], seconds: float,
) -> Report:  # fmt: skip
    latency, widths = measured.latency, dict(settled.choice.widths)
    descriptions = {p.name: p.description for p in measured.dissection.pieces}
    rows = [
        PieceRow(
            t.name, descriptions.get(t.name, "joint"), 1, t.weight * t.at(latency.dense), t.weight * t.at(widths),
            tuple(int(e.at(latency.dense)) for e in t.extents), tuple(int(e.at(widths)) for e in t.extents),
        )
        for t in latency.terms
    ]  # fmt: skip
    return Report(
        budget_ms=parse_budget(budget.target, dense_ms),
        dense_ms=dense_ms,
        promised_ms=settled.choice.promised_ms,
        measured_ms=slim_ms,
        parity_max_rel=parity,
        params_dense=params[0],
        params_slim=params[1],
        macs_dense=macs[0],
        macs_slim=macs[1],
        metric_dense=metrics[0],
        metric_slim=metrics[1],
        seconds=seconds,
        rounds=settled.rounds,
        fingerprint=asdict(measured.fingerprint),
        pieces=tuple(rows),
        groups=tuple(GroupRow(g, n, widths[g]) for g, n in latency.dense.items()),
        skipped=tuple(frozen.items()),
        error=dict(latency.error),
    )
