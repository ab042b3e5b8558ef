"""Apply a plan to an ONNX graph with onnx-graphsurgeon; no torch needed.

1. Find every tensor by initialiser name, slice it. A shared initialiser whose readers are cut differently is copied
   first, one copy per reader; exporters share equal tensors between layers.
2. Mend literal sizes from the labelled axes of their value (`sluice.passes.cut.mend_onnx`).
3. Forget cached intermediate shapes *before* anything is folded, else stale sizes are folded in; infer them again,
   strictly, and run the checker. Node metadata, which graphsurgeon drops, is put back by output name.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
import onnx

from sluice.core.errors import SluiceError, first_line
from sluice.core.plan import Edits, Plan
from sluice.passes.cut.drop_onnx import drop_onnx
from sluice.passes.cut.factor import factors, random_factors
from sluice.passes.cut.factor_onnx import factorize_onnx
from sluice.passes.cut.mend_onnx import Mender
from sluice.passes.cut.merge_onnx import merge_onnx
from sluice.passes.cut.resolve import masks_of_slices, tensor_masks
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph, infer_checked, is_hollow, say_sizes, sizes_of

__all__ = ["cut_graph", "restructure", "rewrite_onnx"]


def rewrite_onnx(model: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
    """The slim ONNX model.

    Args:
        model: dense model whose initialisers carry the parameter names of the plan.
    Raises:
        SluiceError: names or shapes do not match the plan, or the plan contradicts the graph.
    """
    shapes = {name: tuple(init.dims) for name, init in OnnxGraph(model).initializers.items()}
    present = tuple(cut for cut in plan.slices if cut.param in shapes)
    Plan(plan.fingerprint, present).check_model(shapes, complete=False)
    if len(present) < len(plan.slices) and not _shared(model, plan):
        plan.check_model(shapes, complete=False)
    try:
        analysis = analyze_onnx(model, dims=True)  # whatever a plan may cut
        keeps = masks_of_slices(analysis, present, plan.fingerprint)
    except SluiceError:
        if not _shared(model, plan):
            raise
        model = _unshare(model, plan)
        analysis = analyze_onnx(model, dims=True)  # whatever a plan may cut
        keeps = masks_of_slices(analysis, present, plan.fingerprint)
    edits = Edits(plan.factorizations, plan.drops, plan.merges)
    slim = restructure(cut_graph(model, analysis, keeps), edits, named=plan.fingerprint)
    _check(slim)
    return slim


def _check(slim: onnx.ModelProto) -> None:
    """Infer shapes in place, strictly, and check what that gives (rule 3)."""
    try:
        infer_checked(slim)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise SluiceError(
            f"the plan leaves a graph whose sizes do not fit each other ({first_line(error)}); take the plan that was "
            f"made for this file, or read the file anew with `sluice inspect`"
        ) from error


def restructure(
    model: onnx.ModelProto, edits: Edits, *, values: bool = True, named: Container[str] | None = None
) -> onnx.ModelProto:
    """Drop, merge and factorise, in this order.

    Args:
        values: False gives new weights the right shapes and any values, which is enough for timing.
        named: the tensors that the edits may name, if the file may hold others.
    """
    if edits.drops:
        model = drop_onnx(model, edits.drops, named)
    if edits.merges:
        model = merge_onnx(model, edits.merges, values=values)
    if edits.factorizations:
        model = factorize_onnx(model, edits.factorizations, split=factors if values else random_factors)
    return model


def cut_graph(model: onnx.ModelProto, analysis: Analysis, keeps: Sequence[np.ndarray]) -> onnx.ModelProto:
    """Slice initialisers and mend literals; ``model`` may be a part of the graph that was analysed.

    Of a tensor that has no numbers (`sluice.passes.graph.onnx_graph.hollow`) the shape is cut.
    """
    import onnx_graphsurgeon as gs

    metadata = {node.output[0]: list(node.metadata_props) for node in model.graph.node if node.metadata_props}
    masks = tensor_masks(analysis, keeps)
    empty = {init.name for init in model.graph.initializer if is_hollow(init)} & {param for param, _ in masks}
    graph = gs.import_onnx(_narrowed(model, masks, empty) if empty else model)
    tensors = graph.tensors()
    for (param, axis), mask in masks.items():
        if param in tensors and param not in empty and isinstance(tensors[param], gs.Constant):
            tensors[param].values = np.ascontiguousarray(np.compress(mask, tensors[param].values, axis=axis))
    mender = Mender(model, analysis, keeps)
    for node in graph.nodes:
        mender.mend(node)
    graph.nodes.extend(mender.added)
    borders = {id(t) for t in (*graph.inputs, *graph.outputs)}
    for tensor in tensors.values():
        lost = mender.lost(tensor.name)
        if isinstance(tensor, gs.Variable) and id(tensor) not in borders:
            tensor.shape = None
        elif isinstance(tensor, gs.Variable) and lost:
            tensor.shape = [int(lost[d].sum()) if d in lost else size for d, size in enumerate(tensor.shape)]
    slim = gs.export_onnx(graph.cleanup().toposort())
    for tensor in tensors.values():  # nodes and tensors refer to each other, and would hold their numbers for long
        if isinstance(tensor, gs.Constant):
            tensor.values = np.zeros(0, np.float32)
    slim.ir_version = model.ir_version
    del slim.metadata_props[:]
    slim.metadata_props.extend(model.metadata_props)
    _mend_sizes(slim, mender)
    for node in slim.graph.node:
        node.metadata_props.extend(metadata.get(node.output[0], []))
    return slim


def _narrowed(
    model: onnx.ModelProto, masks: Mapping[tuple[str, int], np.ndarray], names: Container[str]
) -> onnx.ModelProto:
    """A copy in which the shapes of these tensors are cut."""
    done = onnx.ModelProto()
    done.CopyFrom(model)
    tensors = OnnxGraph(done).initializers
    for (param, axis), mask in masks.items():
        if param in names:
            tensors[param].dims[axis] = int(mask.sum())
    return done


def _mend_sizes(slim: onnx.ModelProto, mender: Mender) -> None:
    """What the metadata says of shapes, as they are now, in place."""
    sizes, shapes = sizes_of(slim)
    if not shapes:
        return
    left = {node.output[0] for node in slim.graph.node}
    for name, (kind, dims) in shapes.items():
        lost = mender.lost(name)
        shapes[name] = (kind, [(int(lost[d].sum()), 0) if d in lost else law for d, law in enumerate(dims)])
    say_sizes(slim, sizes, {name: said for name, said in shapes.items() if name in left})


def _shared(model: onnx.ModelProto, plan: Plan) -> set[str]:
    """Float initialisers with several readers that may stand for several tensors of the plan's model.

    They are constants of the exporter's own, and tensors whose shape is that of a tensor the file lacks. Any other
    shared tensor is one that the model itself uses twice.
    """
    graph = OnnxGraph(model)
    initializers = graph.initializers
    missing = {shape for name, shape in plan.fingerprint.items() if name not in initializers}
    floats = {
        name
        for name, init in initializers.items()
        if init.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        and (name not in plan.fingerprint or tuple(init.dims) in missing)
    }
    return {name for name in floats if len({id(node) for node in graph.readers.get(name, ())}) > 1}


def _unshare(model: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
    """Every reader but the first of a shared initialiser gets its own copy."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = OnnxGraph(copy).initializers
    taken: dict[str, int] = {}
    shared = _shared(model, plan)
    for node in copy.graph.node:
        for index, name in enumerate(node.input):
            if name not in shared:
                continue
            taken[name] = taken.get(name, -1) + 1
            if taken[name]:
                private = copy.graph.initializer.add()
                private.CopyFrom(tensors[name])
                private.name = node.input[index] = f"{name}::{taken[name]}"
    return copy
