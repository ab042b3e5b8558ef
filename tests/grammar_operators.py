"""The supported operators inside random networks, one after another, and which of them some networks reach.

1. The cases of the ATen table (`tests.passes.graph.test_coupling`) hold an operator between two layers. A network of
   the grammar has such a case behind its input, then random parts and the head, so its operator meets random widths,
   ranks, blocks and merged runs. Consecutive numbers take consecutive cases.
2. `reached` are the names of operators in a captured graph and in an exported one, `missing` those of the table that
   a number of networks did not reach. `NEVER` names operators that no such network can have, and why.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import onnx
import torch
from torch import fx, nn

from sluice.passes.graph.aten_walk import operator_name
from sluice.passes.graph.capture_modes import DROPOUTS, BatchNorm
from sluice.passes.graph.operators import ATEN, ONNX
from tests.passes.graph.test_coupling import CASES, Between
from tests.passes.graph.test_operators import APART, DIFFERENT

__all__ = ["ENOUGH", "NEVER", "SWEPT", "missing", "operator_case", "reached", "readings_agree"]

SWEPT = [case for case in CASES if case.name not in {*APART, "ones_like"}]  # no export has the layers of these
ENOUGH = 2 * len(SWEPT) // 3 + 4  # consecutive networks that have every case: two of them in three of four networks
_NO_EXPORT = "torch.onnx does not know it; test_coupling cuts it in torch"
_STEPS = "its export shares steps between layers; tests/sequences.py has it alone"
_NO_RULE = "it has no rule, so what it reads stays whole; test_coupling has it"
_OF_FILES = "torch.onnx does not write it; test_onnx_axes cuts it"
NEVER = {
    "aten.ones_like": "the export leaves out layers that nothing depends on",
    **dict.fromkeys(("aten.rrelu", "aten.adaptive_avg_pool3d"), _NO_EXPORT),
    **{f"aten.adaptive_max_pool{d}d": _NO_EXPORT for d in (1, 2, 3)},
    **{f"aten.{kind}": _STEPS for kind in (
        "lstm_cell", "gru_cell", "rnn_tanh", "rnn_relu", "rnn_tanh_cell", "rnn_relu_cell",
    )},
    "onnx.RNN": _STEPS,
    **dict.fromkeys(("aten.narrow.Tensor", "aten.view.dtype", "aten.where.default"), _NO_RULE),
    "onnx.GroupNormalization": "torch.onnx does not write it; files of others are read without it",
    **{f"onnx.{kind}": _OF_FILES for kind in (
        "Acos", "Acosh", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "Attention", "CastLike",
        "Constant", "Cosh", "Dropout", "Flatten", "GlobalLpPool", "GlobalMaxPool", "GridSample",
        "Identity", "IsInf", "LpNormalization", "LpPool", "Mean", "Or", "RMSNormalization", "Range", "ReduceL1",
        "ReduceLogSum", "ReduceSumSquare", "Shrink", "SimplifiedLayerNormalization", "Sinh", "Softsign",
        "SpaceToDepth", "Sum", "Swish", "Tan", "ThresholdedRelu", "TopK", "Trilu", "Upsample", "Xor",
    )},
}  # fmt: skip


def operator_case(number: int) -> tuple[nn.Module, tuple[int, ...], str]:
    """The network of a case in eval mode, the shape of its input without the batch, and its name."""
    case = SWEPT[number % len(SWEPT)]
    return Between(case.before(), case.function, case.after(), copy.deepcopy(case.extra)), case.shape, case.name


def readings_agree(said: str) -> bool:
    """Whether both readings of a network must be equal, by the names of its parts."""
    return not set(said.split(" > ")) & set(DIFFERENT)


def reached(captured: fx.GraphModule, exported: onnx.ModelProto) -> frozenset[str]:
    """The names of all operators: ``aten.NAME`` as captured, ``onnx.TYPE`` as exported."""
    calls = [n for n in captured.graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)]
    modules = {type(captured.get_submodule(n.target)) for n in captured.graph.nodes if n.op == "call_module"}
    raised = {f"aten.{name}" for name, kind in (*DROPOUTS.items(), ("batch_norm", BatchNorm)) if kind in modules}
    written = {f"onnx.{n.op_type}" for n in exported.graph.node}
    return frozenset(raised | written | {f"aten.{operator_name(n)}" for n in calls})


def missing(met: Collection[str]) -> list[str]:
    """The operators of the table that were not met, less `NEVER`."""
    table = {f"aten.{name}" for name in ATEN} | {f"onnx.{name}" for name in ONNX}
    return sorted(table - set(met) - set(NEVER))
