"""ONNX files as others export them: what the runtime runs is read.

1. What a file declares of inner values and outputs is a hint. Shapes are inferred anew from the operators; those that
   inference does not know are taken from a run of the file (`sluice.passes.files.observe`).
2. The model that is read computes what the file computes, in one form (`sluice.passes.files.plain`): no local
   functions, no Constant nodes, no branch whose condition is known, operators as in opset 13 or later.
3. Every open size beside the batch has a number in the model's metadata (`sluice.passes.graph.onnx_graph.say_sizes`),
   for analysis and measurement; the graph leaves it open. Numbers come from example inputs, else from a trial of a few.
4. Nothing is written to the file; `written_back` gives a changed model the form of the file again: opset, declared
   inputs and outputs, metadata.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from sluice.core.errors import SluiceError
from sluice.passes.files.branches import fold_branches
from sluice.passes.files.group_norms import write_out_group_norms
from sluice.passes.files.observe import observed
from sluice.passes.files.opset import PLAIN, as_opset, at_plain_opset, opset_of
from sluice.passes.files.plain import graphs_in, plain, with_fixed, without_unread
from sluice.passes.files.trials import fed, open_axes, run_once
from sluice.passes.graph.onnx_file import read_message
from sluice.passes.graph.onnx_graph import SIZES, OnnxGraph, infer_weightless, say_sizes
from sluice.passes.graph.static_shapes import stand_in_batch, static_sizes

__all__ = ["OnnxFile", "as_it_is", "load_whole", "read_onnx_file", "says_all", "written_back"]

QUANTISED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "ConvInteger",
    "MatMulInteger",
    "QLinearConv",
)
CONTROL = ("If", "Loop", "Scan")


@dataclass(frozen=True, slots=True, eq=False)
class OnnxFile:
    """A file as it is read.

    Attributes:
        model: what the file computes, in one form, with shapes inferred and weights as initialisers.
        given: the file's own graph without its weights, for `written_back`.
        inputs: example inputs on which the runtime ran the file, in the order of the file; fixed ones included.
        batch_is_open: did the runtime run it at two batches?
        sizes: of the open sizes beside the batch, by name.
        says_all: was the file taken as it is (`says_all`)?
    """

    model: onnx.ModelProto
    given: onnx.ModelProto
    inputs: Mapping[str, np.ndarray]
    batch_is_open: bool
    sizes: Mapping[str, int]
    says_all: bool = False


def read_onnx_file(
    source: str | os.PathLike[str] | onnx.ModelProto,
    inputs: Mapping[str, np.ndarray] | None = None,
    fixed: Mapping[str, float] | None = None,
) -> OnnxFile:
    """Read an ONNX file that ONNX Runtime runs.

    Args:
        inputs: examples by name, with the sizes that shall count; some or all of them.
        fixed: numbers of inputs that stay the same for good, or sizes of open axes by their name.
    Raises:
        SluiceError: the file cannot be read, is quantised, or the runtime does not run it on any inputs tried.
    """
    model = load_whole(source)
    name = os.fspath(source) if not isinstance(source, onnx.ModelProto) else "the model"
    _check_whole(model, name)
    given = _weightless(model)
    model = plain(model, keep=isinstance(source, onnx.ModelProto))
    with_fixed(model, fixed or {})
    at_plain_opset(model)
    write_out_group_norms(model)
    declared = _forgotten(model)
    feeds, sizes = run_once(model, name, inputs or {})
    fold_branches(model, sizes)
    without_unread(model.graph)
    _shape(model, sizes, feeds, declared)
    is_open = len(feeds) > 1 and bool(open_axes(model).keys() - sizes.keys())
    return OnnxFile(model, given, next(iter(feeds.values())), is_open, sizes)


def _forgotten(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Forget, in place, what the file says of shapes of inner values and outputs (rule 1); the outputs as they were."""
    declared = []
    for info in model.graph.output:
        declared.append(onnx.ValueInfoProto())
        declared[-1].CopyFrom(info)
        info.type.tensor_type.ClearField("shape")
    for graph in graphs_in(model.graph):
        del graph.value_info[:]
    return declared


def says_all(model: onnx.ModelProto) -> bool:
    """Does the graph tell every shape by itself, in the one form? Then there is nothing to run, and nothing to change.

    Such are the files that ``sluice export`` writes.
    """
    names = {n for n, places in open_axes(model).items() if any(axis for _, axis, _ in places)}
    read = OnnxGraph(model)
    constants = (read.array(node.output[0]) for node in model.graph.node if node.op_type == "Constant")
    if opset_of(model) < PLAIN or names or any(a is not None and a.dtype.kind == "f" and a.size > 1 for a in constants):
        return False
    if any(node.op_type in CONTROL for node in model.graph.node):
        return False
    try:
        static = static_sizes(model, stand_in_batch(model) or 1)
    except SluiceError:
        return False
    known = OnnxGraph(static).shapes
    return all(name in known for node in static.graph.node for name in node.output if name)


def load_whole(source: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """The model in a file with its external data, as it is; `SluiceError` where it is none."""
    if isinstance(source, onnx.ModelProto):
        return source
    return read_message(source, "an ONNX file")


def _check_whole(model: onnx.ModelProto, name: str) -> None:
    if not model.graph.node:  # an empty file is a valid message
        raise SluiceError(f"{name!r} is not an ONNX file (it holds no operator); give an ONNX file")
    quantised = [node for node in model.graph.node if node.op_type in QUANTISED or node.op_type.startswith("QLinear")]
    if quantised:
        raise SluiceError(
            f"{name!r} is quantised (it holds {quantised[0].op_type}); give the file in float32, and quantise what "
            f"comes out"
        )


def _shape(
    model: onnx.ModelProto,
    sizes: Mapping[str, int],
    feeds: Mapping[int, Mapping[str, np.ndarray]],
    declared: Sequence[onnx.ValueInfoProto],
) -> None:
    """Say all shapes that can be known, of inner values and outputs, in place (rule 1)."""
    say_sizes(model, sizes)
    statics = [static_sizes(model, batch) for batch in feeds]
    lacking: dict[str, None] = {}
    for static in statics:
        known = OnnxGraph(static).shapes
        lacking.update(dict.fromkeys(n for node in static.graph.node for n in node.output if n and n not in known))
    if lacking:
        say_sizes(model, sizes, observed(model, list(lacking), feeds))
        statics = [static_sizes(model, batch) for batch in feeds]
    found = [OnnxGraph(static).shapes for static in statics]
    for info, hint in zip(model.graph.output, declared, strict=True):
        shapes = [one[info.name] for one in found if info.name in one]
        if shapes:
            _declare(info, shapes, hint, bool(sizes))
    model.graph.value_info.extend(_inferred(model))


def _declare(
    info: onnx.ValueInfoProto, shapes: Sequence[Sequence[int]], hint: onnx.ValueInfoProto, has_sizes: bool
) -> None:
    """Shape of an output: names of the hint where it has some, numbers only where nothing open can change them."""
    hints = hint.type.tensor_type.shape.dim
    info.type.tensor_type.shape.SetInParent()
    for axis, each in enumerate(zip(*shapes, strict=True)):
        dim = info.type.tensor_type.shape.dim.add()
        told = hints[axis] if len(hints) == len(shapes[0]) else onnx.TensorShapeProto.Dimension()
        if told.dim_param:
            dim.dim_param = told.dim_param
        elif len(set(each)) == 1 and (not has_sizes or told.dim_value == each[0]):
            dim.dim_value = each[0]


def _inferred(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    try:
        return list(infer_weightless(model).value_info)
    except onnx.shape_inference.InferenceError:
        return []


def as_it_is(model: onnx.ModelProto) -> OnnxFile:
    """A model that says all, as a file: nothing to give back."""
    axes, sizes = open_axes(model), dict[str, int]()
    return OnnxFile(model, _weightless(model), fed(model, sizes, 1, {}), bool(axes), sizes, says_all=True)


def _weightless(model: onnx.ModelProto) -> onnx.ModelProto:
    """What `written_back` needs of a file."""
    done = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, metadata_props=model.metadata_props,
        producer_name=model.producer_name, producer_version=model.producer_version, domain=model.domain,
        model_version=model.model_version, doc_string=model.doc_string,
    )  # fmt: skip
    done.graph.name, done.graph.doc_string = model.graph.name, model.graph.doc_string
    done.graph.input.extend(OnnxGraph(model).inputs.values())
    done.graph.output.extend(model.graph.output)
    return done


def written_back(file: OnnxFile, model: onnx.ModelProto, *, opset: bool = True) -> onnx.ModelProto:
    """A changed model in the form of the file: opset where nothing newer is needed, inputs, outputs and metadata.

    Args:
        opset: False leaves the operators as they are.
    """
    done = onnx.ModelProto()
    done.CopyFrom(model)
    for field in ("input", "output"):
        del getattr(done.graph, field)[:]
        getattr(done.graph, field).extend(getattr(file.given.graph, field))
    del done.graph.value_info[:]
    done = as_opset(done, opset_of(file.given)) if opset else done
    own = {entry.key for entry in file.given.metadata_props}
    added = [entry for entry in done.metadata_props if entry.key not in own and entry.key != SIZES]
    del done.metadata_props[:]
    done.metadata_props.extend([*file.given.metadata_props, *added])
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(done, field, getattr(file.given, field))
    done.graph.name, done.graph.doc_string = file.given.graph.name, file.given.graph.doc_string
    return done
