"""An ONNX file's whole way to a faster one: read, profile, score, price, decide and verify, cut, refit, distil.

1. The file is read as the runtime runs it (`sluice.passes.files.read`). What comes back is the file's own graph with
   fewer channels: inputs, outputs, opset and metadata are as they were.
2. The loss of a change is the distance of the outputs from the file's own on some examples
   (`sluice.importance.output_distance`). Channels go by their activations and weights (`sluice.importance.activity`).
3. Weights behind a cut are refitted by least squares (`sluice.training.refit_onnx`) on three quarters of the examples.
   Where steps are asked for, which takes torch, all weights are then trained towards the file's own outputs
   (`sluice.training.distill_onnx`). Either counts only where the file is nearer by it on the last quarter.
4. That quarter also says what was kept: the figure of merit is ``evaluate``'s, or 100 times the cosine between the
   outputs of both files.
5. Engines are built and timed at the sizes of the examples; what the file leaves open stays open in what comes back.
6. The engine of what comes back must compute what the cut file computes (`sluice.artifacts.engine_check`). Where it
   does not, the result is saved, and that is an error.
7. Budgets in percent count from the user's file, where that is faster than the same file in our form. A file that runs
   only with fixed inputs is compared with nothing else.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.artifacts.folder import check_writable
from sluice.artifacts.labels import provenance
from sluice.artifacts.macs import count_macs
from sluice.artifacts.report_recovery import RecoveryRow
from sluice.artifacts.result_file import CompressedFile
from sluice.core.budget_spec import BudgetSpec
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError, first_line
from sluice.core.heap import give_back_holes
from sluice.core.plan import InputSpec, Plan
from sluice.core.progress import Advance, stage
from sluice.core.version import INSTALL_TORCH
from sluice.core.weight_bytes import parked
from sluice.importance.activity import activity_scores
from sluice.importance.onnx_losses import examples_for, onnx_losses
from sluice.importance.output_distance import OutputDistance, cosine, outputs_of
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.files.read import OnnxFile, load_whole, read_onnx_file, written_back
from sluice.passes.files.rows import Rows, rows_of
from sluice.passes.graph.onnx_file import finalize
from sluice.passes.graph.onnx_graph import OnnxGraph, hollow
from sluice.passes.graph.width_limits import WidthLimits
from sluice.passes.search_space import agreed, find_search_space, read_onnx
from sluice.pipeline.pairs import Pairs, engine_check
from sluice.pipeline.plain import counted_from, share_beside
from sluice.pipeline.problem import Problem
from sluice.pipeline.report_figures import make_report
from sluice.pipeline.verify import final_pair, solve_verified
from sluice.profiler.profile import profile_onnx
from sluice.runtime.base.compare import relative_error
from sluice.runtime.base.inputs import Shapes
from sluice.solver.decide import restricted
from sluice.solver.options import check_methods
from sluice.training.refit_onnx import refit_onnx

__all__ = ["FILE_METHODS", "compress_onnx"]

FILE_METHODS = ("filter", "rank", "block")
SCORED, REFITTED = 64, 512  # examples
HELD = 4  # every which part of the examples is held out
PARITY = 1e-4
KEPT = "cosine of outputs in percent"
OWN_OUTPUTS = "distance to the file's outputs"


def compress_onnx(
    source: str | os.PathLike[str] | onnx.ModelProto,
    inputs: Mapping[str, np.ndarray],
    *,
    budget: str | Mapping[str, str | float],
    table: str | os.PathLike[str] = ":memory:",
    out: str | os.PathLike[str] | None = None,
    batch: int = 1,
    target: str = "ort-cpu",
    threads: int = 1,
    exclude: Sequence[str] = (),
    methods: Sequence[str] = FILE_METHODS,
    keep: Mapping[str, float] | None = None,
    multiple: Mapping[str, int] | None = None,
    fixed: Mapping[str, float] | None = None,
    loss: str = "auto",
    evaluate: Callable[[Any], float] | None = None,
    refit: bool = True,
    steps: int = 0,
    seed: int = 0,
    note: str = "",
    minutes: float = math.inf,
    progress: bool = True,
) -> CompressedFile:
    """Make an ONNX file fit a measured latency budget; no labels, and without ``steps`` no torch and no training.

    Args:
        source: the file, in float32.
        inputs: by input of the file the examples, one after the other along the batch axis; some hundred serve.
        budget: ``"50%"`` of the file's latency, ``"2.4ms"`` or ``{"latency_ms": 2.4}``, at ``batch`` on ``target``.
        table: latency table (SQLite), made or continued.
        out: folder for plan, ONNX file and report.
        methods: some of ``filter``, ``rank``, ``block``, ``merge``; a merge takes activations away for good.
        keep, multiple: as for `sluice.compress`.
        fixed: numbers of inputs that stay the same for good, or sizes of open axes by their name.
        loss: ``auto``, ``mse``, ``logits`` or ``cosine``: the distance between outputs.
        evaluate: figure of merit of a session of ONNX Runtime, the higher the better, for the report.
        refit: refit the weights behind a cut by least squares.
        steps: of training towards the file's own outputs; needs torch.
        seed: of the order of the examples in that training.
        note: on the inputs, for the report.
        minutes: of profiling; afterwards points that a plan needs are estimated, and the report says how much.
    Raises:
        SluiceError: a mistake that the caller can mend, or the runtime computes another network than the file; no
            half-written file is left behind.
    """
    started = time.perf_counter()
    methods, asked = check_methods(methods), BudgetSpec.parse(budget)
    limits = WidthLimits(keep or {}, multiple or {})
    if steps and find_spec("torch") is None:
        raise SluiceError(f"steps={steps} train the file, which needs PyTorch; {INSTALL_TORCH}, or leave steps out")
    if out is not None:
        check_writable(out, 0, {"the latency table": table})
    with _stage("read", progress):
        examples = _arrays(inputs)
        file = read_onnx_file(source, examples, fixed)
        rows = rows_of(file, examples)
        dense, timed = file.model, _sized(file.model, file)
        kept, held = _split(rows)
        space = find_search_space(read_onnx(dense), exclude, limits)
    figure = _figure(evaluate, dense, held)
    metric_dense = figure(dense)
    measured = profile_onnx(
        dense, table, deployment=Deployment(target, batch, threads), exclude=exclude, methods=methods, like=space,
        minutes=minutes, progress=progress,
    )  # fmt: skip
    analysis = agreed(space, measured.space).analysis
    with _stage("the file as it is", progress) as advance:
        whole = parked(measured.engine(finalize(timed)))
        plain = share_beside(measured, timed if fixed else _sized(load_whole(source), file), whole, advance)
    wanted = counted_from(plain, asked)
    sites = measured.options.sites(measured.latency, methods)
    with _stage("price every choice", progress) as advance:
        scores = activity_scores(dense, analysis, kept.spread(SCORED))
        offered = restricted(measured.latency, sites)
        macs = count_macs(finalize(timed))
        priced = kept.spread(examples_for(macs, offered))
        distance = OutputDistance(dense, priced, loss)
        losses = onnx_losses(dense, analysis, offered, measured.options, scores, distance, advance)
        del distance, priced  # an engine, and values of the file
    specs = tuple(InputSpec(value.shape, str(value.dtype), name) for name, value in next(kept.batches(2)).items())
    problem = Problem(measured, analysis, sites, losses, scores, specs)
    with _stage("decide and verify on engines", progress):
        verified = solve_verified(problem, wanted, timed, Pairs(measured, whole, wanted))
    slim = rewrite_onnx(dense, verified.plan)
    slim, recovered = _recovered(slim, dense, verified.plan, (kept, held), (refit, steps, seed, loss), progress)
    params, file = (_size(dense), _size(slim)), replace(file, model=hollow(dense))
    del dense, timed  # all that is left to do is about the slim file
    with _stage("measure", progress) as advance:
        wide = _sized(slim, file)
        done = finalize(wide)
        deployed = measured.engine(done)
        times = final_pair(measured, whole, deployed, wanted, verified, advance)
        engine = measured.runner().build(deployed, batch=measured.fingerprint.batch)
        computed = engine_check(measured, engine, deployed, wide)
        del engine
    made = written_back(file, deployed if wide is slim else measured.engine(finalize(slim)))
    worst = relative_error(list(outputs_of(made, held).values()), list(outputs_of(slim, held).values()))
    report = make_report(
        measured, verified, times=times, worst=worst, params=params,
        macs=(macs, count_macs(done)), metrics=(metric_dense, figure(made), None),
        frozen={**measured.space.left_alone, **measured.refused, **({"the data": note} if note else {})},
        seconds=time.perf_counter() - started, losses=losses, plain=plain,
        methods=methods, figure="accuracy" if evaluate else KEPT,
        recovery=recovered, outputs=computed,
    )  # fmt: skip
    for key, value in provenance(verified.plan, report).items():
        made.metadata_props.add(key=f"sluice.{key}", value=value)
    result = CompressedFile(made, verified.plan, report, _tensors(slim))
    if worst > PARITY:
        raise AssertionError(f"the file that is handed out differs by {worst:.2e} from the one that was cut")
    if out is not None:
        result.save(out)
    if not computed.same:
        raise computed.refusal(f"the engine of {measured.target}")
    return result


@contextmanager
def _stage(name: str, progress: bool) -> Iterator[Advance]:
    """A stage that leaves no holes behind, which would come on top of what the next one needs."""
    with stage(name, progress) as advance:
        yield advance
    give_back_holes()


def _arrays(inputs: object) -> dict[str, np.ndarray]:
    if not isinstance(inputs, Mapping) or not inputs:
        raise SluiceError(f"inputs is {type(inputs).__name__}; give a mapping from the file's inputs to their examples")
    return {str(name): np.asarray(value) for name, value in inputs.items()}


def _split(rows: Rows) -> tuple[Rows, Rows]:
    """Examples to work with, and those that are held out; all for both where there are few."""
    step = rows.batch or 1
    count = rows.count // HELD // step * step
    if not count:
        return rows, rows
    return rows.part(0, rows.count - count), rows.part(rows.count - count, rows.count)


def _figure(
    evaluate: Callable[[Any], float] | None, dense: onnx.ModelProto, held: Rows
) -> Callable[[onnx.ModelProto], float]:
    """Rule 4."""
    if evaluate is None:
        want = OutputDistance(dense, held).reference

        def kept(model: onnx.ModelProto) -> float:
            found = outputs_of(model, held)
            return 100.0 * float(np.mean([cosine(found[name], value) for name, value in want.items()]))

        return kept
    if not callable(evaluate):
        raise SluiceError(f"evaluate={evaluate!r} is no function; give one from a session of ONNX Runtime to a number")

    def taken(model: onnx.ModelProto) -> float:
        from sluice.runtime.ort.session import load_session

        session = load_session(model, Shapes(), "CPUExecutionProvider", threads=0)  # all cores
        try:
            return float(evaluate(session))
        except SluiceError:
            raise
        except Exception as error:
            raise SluiceError(f"evaluate raised {type(error).__name__}: {first_line(error)}; mend it") from error

    return taken


def _recovered(
    slim: onnx.ModelProto, dense: onnx.ModelProto, plan: Plan, examples: tuple[Rows, Rows],
    asked: tuple[bool, int, int, str], progress: bool,
) -> tuple[onnx.ModelProto, RecoveryRow | None]:  # fmt: skip
    """Rule 3: the nearest of the cut file, the refitted and the trained one, and how it was made."""
    (kept, held), (refit, steps, seed, loss), row = examples, asked, None
    distance = OutputDistance(dense, held, loss)
    before = nearest = distance.of(slim)
    if refit:
        with _stage("refit", progress):
            made, count = refit_onnx(slim, dense, plan, kept.spread(REFITTED))
        if count and (found := distance.of(made)) < nearest:
            slim, nearest, row = made, found, RecoveryRow(0.0, "", "plain", 0, refitted=count)
    if steps:
        from sluice.training.distill_onnx import distill_onnx

        with _stage("train towards the file's outputs", progress) as advance:
            made, rate = distill_onnx(slim, dense, kept, steps, loss=loss, seed=seed, advance=advance)
        if (found := distance.of(made)) < nearest:
            refitted = row.refitted if row else 0
            slim, row = made, RecoveryRow(rate, OWN_OUTPUTS, "plain", steps, (), OWN_OUTPUTS, before, 0.0, refitted)
    return slim, row


def _sized(model: onnx.ModelProto, file: OnnxFile) -> onnx.ModelProto:
    """The model whose inputs have numbers for all sizes but the batch (rule 5), whatever they declared before.

    It is itself where they have, else a copy.
    """
    read = OnnxGraph(file.model).inputs
    if not file.sizes and all(read.get(name) == info for name, info in OnnxGraph(model).inputs.items()):
        return model
    done = onnx.ModelProto()
    done.CopyFrom(model)
    known = OnnxGraph(file.model).inputs
    for name, info in OnnxGraph(done).inputs.items():
        dims = info.type.tensor_type.shape.dim
        del dims[:]
        for read in known[name].type.tensor_type.shape.dim:
            size = read.dim_value if read.HasField("dim_value") else file.sizes.get(read.dim_param)
            dims.add(dim_value=size) if size is not None else dims.add(dim_param=read.dim_param)
    if file.sizes:
        del done.graph.value_info[:]
    return done


def _tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    found = {name: numpy_helper.to_array(init) for name, init in OnnxGraph(model).initializers.items()}
    return {name: value for name, value in found.items() if value.dtype.kind in "fiub"}


def _size(model: onnx.ModelProto) -> int:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return sum(int(np.prod(i.dims)) for i in OnnxGraph(model).initializers.values() if i.data_type in floats)
