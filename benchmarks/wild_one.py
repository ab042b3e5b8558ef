"""One ONNX file of the wild: read, accounted for, cut to half at random, and compared."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.wild_files import WildFile
from benchmarks.wild_masked import masked
from sluice.core.errors import SluiceError, first_line
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.files.observe import drawn
from sluice.passes.files.plain import graphs_in
from sluice.passes.files.read import OnnxFile, read_onnx_file, written_back
from sluice.passes.graph.groups import Analysis, keep_masks, module_of
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.passes.search_space import SearchSpace, find_search_space, read_onnx
from sluice.runtime.base.compare import relative_error

__all__ = ["TOLERANCE", "Row", "measure"]

TOLERANCE = 1e-5
BATCHES = (2, 5)


@dataclass(slots=True)
class Row:
    """What one file gave. ``failed`` names the stage that fell short, empty where none did.

    ``errors`` are relative to the largest number of each output, by the sizes of the inputs. ``moved`` is how far the
    masked original is from the original: a cut that moves nothing would show nothing.
    """

    package: str
    version: str
    path: str
    runs: bool = True
    quantised: bool = False
    failed: str = ""
    reason: str = ""
    batch_is_open: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    opset: int = 0
    opset_out: int = 0
    groups: int = 0
    channels: int = 0
    matrices: int = 0
    share: float = 0.0
    left: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    read_errors: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    seconds: float = 0.0


def measure(wild: WildFile, path: Path) -> Row:
    """The row of one file that lies at ``path``."""
    row = Row(wild.package, wild.version, wild.path)
    start = time.process_time()
    stage = "read"
    try:
        examples = {name: np.asarray(value) for name, value in wild.examples().items()}
        file = read_onnx_file(path, examples, wild.fixed)
        row.batch_is_open, row.sizes = file.batch_is_open, dict(file.sizes)
        stage = "analysis"
        space = find_search_space(read_onnx(file.model))
        _account(row, space, file.model)
        stage = "cut"
        kept = halves(space.analysis)
        row.groups, row.channels = len(space.analysis.groups), sum(g.size for g in space.analysis.groups)
        slim = written_back(file, rewrite_onnx(file.model, make_plan(space.analysis, kept)))
        row.opset, row.opset_out = _opset(file.given), _opset(slim)
        stage = "compare"
        reference = masked(file.model, space.analysis, keep_masks(space.analysis, kept))
        _compare(row, wild, file, onnx.load(path), slim, reference)
        if not row.groups:
            row.failed, row.reason = "cut", "nothing can be cut"
        elif max(row.read_errors.values()) > TOLERANCE:
            row.failed, row.reason = "read", f"what is read differs by {max(row.read_errors.values()):.1e}"
        elif max(row.errors.values()) > TOLERANCE:
            row.failed, row.reason = "compare", f"differs by {max(row.errors.values()):.1e}"
        elif row.moved < 10 * TOLERANCE:
            row.failed, row.reason = "compare", f"the outputs move by {row.moved:.1e} alone, which shows nothing"
    except SluiceError as error:
        row.failed, row.reason = stage, str(error).replace(str(path), path.name)
        row.quantised = "is quantised" in str(error)
        row.runs = "ONNX Runtime" not in str(error)
    except Exception as error:  # a bug of any kind is a row as well
        row.failed, row.reason = stage, f"{type(error).__name__}: {first_line(error)}"
    row.seconds = round(time.process_time() - start, 1)
    return row


def halves(analysis: Analysis, seed: int = 0) -> dict[str, list[int]]:
    """Half of every group, drawn at random."""
    rng = np.random.default_rng(seed)
    return {
        group.name: sorted(rng.choice(group.size, max(1, group.size // 2), replace=False).tolist())
        for group in analysis.groups
    }


def _account(row: Row, space: SearchSpace, model: onnx.ModelProto) -> None:
    """Every matrix lies on a group or has a reason."""
    sizes: dict[str, int] = {}
    for graph in graphs_in(model.graph):
        for init in graph.initializer:
            if init.data_type in FLOATS and sum(size > 1 for size in init.dims) > 1:
                sizes[init.name] = int(np.prod(init.dims))
    cut = {ref.param for group in space.analysis.groups for ref in group.refs}
    told = space.left_alone
    row.matrices = len(sizes)
    row.share = round(sum(size for name, size in sizes.items() if name in cut) / max(1, sum(sizes.values())), 4)
    for name in sizes:
        if name not in cut:
            why = told.get(name) or told.get(module_of(name))
            if why is None:
                row.silent.append(name)
            else:
                row.left[name] = why


LAYOUTS = ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Cast")
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)


def _compare(
    row: Row, wild: WildFile, file: OnnxFile, given: onnx.ModelProto, slim: onnx.ModelProto, reference: onnx.ModelProto
) -> None:
    """At two batches where the batch is open, and at other sizes where these are open."""
    settings = {f"batch {batch}": (file.sizes, batch) for batch in (BATCHES if file.batch_is_open else (1,))}
    if file.sizes:
        settings["other sizes"] = ({name: 2 * size for name, size in file.sizes.items()}, 1)
    logits = _logits(file.model)
    runs = [_Run(model) for model in (given, file.model)]
    cuts = [_Run(_with_outputs(model, logits)) for model in (file.model, reference, slim)]
    for name, (sizes, batch) in settings.items():
        feeds = {**drawn(file.model, sizes, batch, seed=1), **wild.values(file.model, sizes, batch)}
        try:
            original = runs[0](feeds)
        except Exception:  # of the runtime's own kinds: the file does not run at such sizes
            if name == "other sizes":
                continue
            raise
        row.read_errors[name] = _error(runs[1](feeds), original)
        dense, expected, found = (
            {key: value for key, value in run(feeds).items() if key not in logits} for run in cuts
        )
        row.errors[name] = _error(found, expected)
        row.moved = max(row.moved, _error(expected, dense))


def _logits(model: onnx.ModelProto) -> dict[str, str]:
    """By output that is a probability, the value that it is one of: a probability near 0 or 1 shows nothing."""
    graph, found = OnnxGraph(model), {}
    for name in graph.outputs:
        node = graph.producers.get(name)
        while node is not None and node.op_type in LAYOUTS:
            node = graph.producers.get(node.input[0])
        if node is not None and node.op_type in ("Sigmoid", "Softmax"):
            found[name] = node.input[0]
    return found


def _with_outputs(model: onnx.ModelProto, logits: Mapping[str, str]) -> onnx.ModelProto:
    done = onnx.ModelProto()
    done.CopyFrom(model)
    done.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(logits.values()))
    return done


def _error(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    floats = [name for name, value in expected.items() if value.dtype.kind == "f"]
    return float(f"{relative_error([found[n] for n in floats], [expected[n] for n in floats]):.3g}")


class _Run:
    """A session as one deploys it, with all optimisations."""

    def __init__(self, model: onnx.ModelProto):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.inputs = {info.name for info in self.session.get_inputs()}
        self.outputs = [info.name for info in self.session.get_outputs()]

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        found = self.session.run(None, {name: value for name, value in feeds.items() if name in self.inputs})
        return dict(zip(self.outputs, found, strict=True))


def _opset(model: onnx.ModelProto) -> int:
    return max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
