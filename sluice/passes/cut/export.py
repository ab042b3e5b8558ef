"""Captured network -> ONNX, in two steps.

1. `to_onnx`: ``torch.onnx.export(dynamo=True, optimize=False)``, the one route on which every initialiser keeps its
   ``state_dict`` name; then constants are folded except where a named tensor would disappear, and pools to one position
   are written as such (`sluice.passes.cut.pools_onnx`). Plans are applied to this file, and pieces are cut from it. A
   network in captured form is not captured again.
2. `sluice.passes.graph.onnx_file.finalize`: fold and clean for deployment (batch norm into convolutions, shape
   arithmetic).
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from sluice.core.errors import SluiceError
from sluice.passes.cut.pools_onnx import with_global_pools
from sluice.passes.graph.capture import Inputs, capture, clone, export_again, has_captured_form
from sluice.passes.graph.onnx_file import finalize, note_buffers, quiet, save_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph

__all__ = ["OPSET", "finalize", "save_onnx", "to_onnx", "with_values"]

OPSET = 20


def to_onnx(model: nn.Module, example_inputs: Inputs, *, opset: int = OPSET) -> onnx.ModelProto:
    """ONNX with the parameter names of ``model`` (eval mode), the batch dynamic if the model allows it."""
    from onnx_ir import passes, to_proto
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir

    gm = clone(model, sharing=True) if has_captured_form(model) else capture(model, example_inputs)
    gm.eval()
    names = set(gm.state_dict())
    with quiet():
        program = export_again(gm, example_inputs)
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
        done = with_global_pools(_without_bias(to_proto(ir_model), names))
    note_buffers(done, (name for name, tensor in gm.named_buffers() if tensor.ndim > 1))
    return done


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
