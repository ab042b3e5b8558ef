"""Captured network -> ONNX, in two steps. Beside that, what plain export makes of the user's module (`plain_export`).

1. `to_onnx`: ``torch.onnx.export(dynamo=True, optimize=False)``, the one route on which every initialiser keeps its
   ``state_dict`` name; then constants are folded except where a named tensor would disappear, and pools to one position
   are written as such (`sluice.passes.cut.pools_onnx`). Plans are applied to this file, and pieces are cut from it. A
   network in captured form is not captured again.
2. `sluice.passes.graph.onnx_file.finalize`: fold and clean for deployment (batch norm into convolutions, shape
   arithmetic).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import MutableMapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx, nn
from torch.utils import _pytree as pytree

from sluice.core.errors import SluiceError
from sluice.passes.cut.pools_onnx import with_global_pools, with_padded_axes
from sluice.passes.graph.aten_walk import arguments
from sluice.passes.graph.capture import Inputs, capture, clone, export_again, has_captured_form, normalize_inputs
from sluice.passes.graph.capture_attention import SDPA, can_be_written, write_attention
from sluice.passes.graph.names_torch import saved_tensors
from sluice.passes.graph.onnx_file import finalize, note_buffers, quiet, save_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph

__all__ = ["OPSET", "check_opset", "finalize", "plain_export", "save_onnx", "to_onnx", "with_values"]

OPSET = 20
LEAST_OPSET = 18  # that torch.onnx writes


def to_onnx(model: nn.Module, example_inputs: Inputs, *, opset: int = OPSET) -> onnx.ModelProto:
    """ONNX with the parameter names of ``model`` (eval mode), the batch dynamic if the model allows it."""
    from onnx_ir import passes, to_proto
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir

    gm = clone(model, sharing=True) if has_captured_form(model) else capture(model, example_inputs, trained=False)
    gm.eval()
    _without_numbers(gm)
    names = set(saved_tensors(gm))
    with quiet():
        program = export_again(gm, example_inputs)
        _as_exported(program.graph)
        try:
            exported = torch.onnx.export(
                program, dynamo=True, optimize=False, external_data=False, verbose=False, opset_version=opset
            )
        except torch.onnx.OnnxExporterError as error:
            reasons = [line for line in str(error).splitlines() if line.startswith("<class")]
            reason = reasons[0].partition(": ")[2] if reasons else str(error).splitlines()[0]
            raise SluiceError(
                f"torch.onnx cannot export {type(model).__name__}: {reason}; replace that operator in the model"
            ) from error
        assert exported is not None
        ir_model = exported.model
        _first_names(ir_model.graph.initializers, gm)
        read = {name for name in names if name in {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}}
        lost = sorted(read - set(ir_model.graph.initializers))
        if lost:
            raise SluiceError(
                f"torch.onnx leaves {lost[0]!r} out of the file of {type(model).__name__}, which would then compute "
                "something else (it knows no projections of an LSTM, for one); write its layer with other operators"
            )
        # A fold that swallows a named tensor would take its name away (Transpose(weight), for one).
        fold_constants_ir(
            ir_model,
            onnx_shape_inference=True,
            should_fold=lambda n: False if any(v is not None and v.name in names for v in n.inputs) else None,
        )
        passes.Sequential(
            common.IdentityEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.ClearMetadataAndDocStringPass(),
        )(ir_model)
        done = with_padded_axes(with_global_pools(_without_bias(to_proto(ir_model), names)))
    note_buffers(done, (name for name, tensor in gm.named_buffers() if tensor.ndim > 1))
    return done


def check_opset(opset: int) -> int:
    """``opset``, or `SluiceError` where the exporter writes no such file."""
    if not LEAST_OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise SluiceError(
            f"opset {opset} is not written; give one from {LEAST_OPSET} to {onnx.defs.onnx_opset_version()}"
        )
    return opset


def plain_export(model: nn.Module, example_inputs: Inputs, batch: int) -> onnx.ModelProto | None:
    """What ``torch.onnx.export(model, dynamo=True)`` writes of ``model`` (eval mode) at ``batch``; None if it fails.

    The example inputs are repeated along axis 0, or cut, to that batch.
    """
    args, kwargs = normalize_inputs(example_inputs)

    def at_batch(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            return leaf
        return leaf[torch.arange(batch, device=leaf.device) % leaf.shape[0]]

    args, kwargs = pytree.tree_map(at_batch, (args, kwargs))
    with quiet():
        try:
            source = copy.deepcopy(model).eval()
            exported = torch.onnx.export(source, args, kwargs=kwargs, dynamo=True, verbose=False, external_data=False)
        except Exception:  # whatever it dies of, there is no such file then
            return None
    return None if exported is None else exported.model_proto


def with_values(model: onnx.ModelProto, module: nn.Module) -> onnx.ModelProto:
    """``model``, which `to_onnx` made of ``module``, with the tensors that ``module`` has now.

    It equals another export, since no named tensor is folded into a constant. ``model`` itself if nothing has changed.
    """
    tensors = {**dict(module.named_buffers()), **module.state_dict()}
    changed = {}
    for index, init in enumerate(model.graph.initializer):
        if init.name in tensors:
            now = tensors[init.name].detach().cpu().numpy()
            if not np.array_equal(numpy_helper.to_array(init), now):
                changed[index] = now
    if not changed:
        return model
    done = onnx.ModelProto()
    done.CopyFrom(model)
    for index, now in changed.items():
        init = done.graph.initializer[index]
        init.CopyFrom(numpy_helper.from_array(now, init.name))
    return done


def _without_numbers(gm: fx.GraphModule) -> None:
    """Outputs that are no tensors, a stride or None, stay in the network; a file has tensors alone."""
    (output,) = gm.graph.find_nodes(op="output")
    kept = tuple(value for value in output.args[0] if isinstance(value, fx.Node) and not _is_number(value))
    if len(kept) < len(output.args[0]):
        output.args = (kept,)
        code = gm.graph._codegen
        code.pytree_info = code.pytree_info._replace(out_spec=pytree.tree_structure(kept))  # type: ignore[attr-defined]
        gm.graph.eliminate_dead_code()
        gm.recompile()


def _as_exported(graph: fx.Graph) -> None:
    """Attention that the exporter cannot take, written out.

    It takes attention of four axes, and with a mask it believes the result to lie otherwise in memory than it does. For
    the same reason a view behind it becomes a reshape.
    """
    found = [node for node in graph.nodes if node.target is SDPA and can_be_written(node)]
    wrong = [n for n in found if n.args[0].meta["val"].ndim != 4 or arguments(n)["attn_mask"] is not None]
    for node in wrong:
        write_attention(node)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default) if wrong else ():
        node.target = torch.ops.aten.reshape.default


def _is_number(node: fx.Node) -> bool:
    """A size, or computed from sizes; a network that was cut has no example values."""
    if "val" in node.meta:
        return not isinstance(node.meta["val"], torch.Tensor)
    sized = node.target is torch.ops.aten.sym_size.int
    return sized or (getattr(node.target, "__module__", "") == "_operator" and node.target is not operator.getitem)


def _first_names(initializers: MutableMapping[str, Any], gm: fx.GraphModule) -> None:
    """Of a tensor that has several names the exporter takes the last, capture the first."""
    state = saved_tensors(gm)
    first: dict[int, str] = {}
    for name, tensor in state.items():
        own = first.setdefault(id(tensor), name)
        if own != name and name in initializers and own not in initializers:
            value = initializers.pop(name)
            value.name = own
            initializers[own] = value


def _without_bias(model: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """For a 1-D or 3-D convolution without bias the exporter writes zeros of a wrong shape, which runtimes refuse."""
    graph = OnnxGraph(model)
    for node in model.graph.node:
        bias = graph.initializers.get(node.input[2]) if node.op_type == "Conv" and len(node.input) > 2 else None
        if bias is None or bias.name in names or len(bias.dims) == 1:
            continue
        if np.any(numpy_helper.to_array(bias)):
            raise AssertionError(f"the exporter gave {node.input[1]!r} a bias of shape {list(bias.dims)}")
        del node.input[2:]
        if not any(bias.name in other.input for other in model.graph.node):
            model.graph.initializer.remove(bias)
    return model
