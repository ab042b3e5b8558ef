"""One row per operator: all that this package knows of it. A literal; no torch, no onnx, no numpy.

1. An operator has a row in `ROWS`, under its names in ATen and in ONNX (in-place variants have the name of their base).
   A new operator is a new row and a case in its tests; no other list of operators exists. An ATen name stands for all
   its overloads but those that have a row of their own, as ``max.other``: the larger of two values is no reduction.
2. ``kind`` says how it couples channels. Both front ends (`sluice.passes.graph.aten`, `sluice.passes.graph.onnx_axes`)
   have a function for every kind that they can read. An operator whose kind has no function freezes its inputs.
3. ``zero`` says when its output is zero, in the words of `sluice.passes.graph.view`: "zero" its first input is zero,
   "sum" all inputs are, "mul" one of them is, "choice" all but the first are. "number": its first input is zero, and
   so is f(0) by a number among its arguments. "" where f(0) != 0 or is not known. ``limits`` need no word: f(0) = 0
   where the range holds 0.
4. ``limits`` are the range that every entry is limited to: numbers, or the names of the arguments that hold them.
   ``weights`` are the names of the arguments that hold weight and bias.
5. ``traits`` are words of `TRAITS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

__all__ = [
    "ATEN",
    "ELEMENTWISE",
    "ONNX",
    "ROWS",
    "TRAITS",
    "UNKNOWN",
    "Operator",
    "aten_operator",
    "onnx_operator",
    "onnx_with",
]

TRAITS = {
    "activation": "may stand inside a chain of convolutions, and goes where the chain is merged",
    "layout": "changes only layout or type: a weight that is read through it is still that weight",
    "norm": "normalises, then has a scale and a shift of its own",
    "nonnegative": "its result cannot be negative, whatever comes in",
    "average": "pools by averaging, which every runtime does in int8",
    "integer": "has an integer kernel in ONNX Runtime",
    "moves": "its result has the numbers of the first operand, so it has its scale in int8 as well",
    "arithmetic": "computes element by element, sums, compares or arranges: float32 can run through it",
    "limit": "reads a constant as a mask, a limit or an epsilon, whose size does not matter in 16 bits",
    "no_bf16": "runtimes have no kernel for it in bfloat16",
}
ELEMENTWISE = ("unary", "combine")  # kinds whose results hold, entry by entry, a function of their operands


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator, or a family of operators about which the same is true.

    Attributes:
        aten: names in ATen, separated by spaces, without the underscore of in-place variants; with their overload where
            it computes something else than the name alone.
        onnx: operator types of ONNX, separated by spaces.
    """

    aten: str
    onnx: str
    kind: str
    zero: str = ""
    traits: str = ""
    limits: tuple[float | str, float | str] | None = None
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.traits.split()) - TRAITS.keys()
        assert not unknown, (self.aten, self.onnx, unknown)

    def is_a(self, trait: str) -> bool:
        return trait in self.traits.split()


_CONV = ("weight", "bias")
ROWS = (
    # Activations.
    Operator("relu", "Relu", "unary", "", "activation nonnegative", (0.0, inf)),
    Operator("relu6", "", "unary", "", "activation", (0.0, 6.0)),
    Operator("hardtanh", "", "unary", "", "activation", ("min_val", "max_val")),
    Operator("clamp clamp_min clamp_max clip", "Clip", "unary", "", "activation arithmetic limit", ("min", "max")),
    Operator("leaky_relu", "LeakyRelu", "unary", "zero", "activation integer"),
    Operator("elu", "Elu", "unary", "zero", "activation"),
    Operator("selu", "Selu", "unary", "zero", "activation"),
    Operator("celu", "Celu", "unary", "zero", "activation"),
    Operator("gelu", "Gelu", "unary", "zero", "activation"),
    Operator("silu", "Swish", "unary", "zero", "activation"),
    Operator("mish", "Mish", "unary", "zero", "activation no_bf16"),
    Operator("hardswish", "HardSwish", "unary", "zero", "activation no_bf16"),
    Operator("tanh", "Tanh", "unary", "zero", "activation"),
    Operator("", "Softsign", "unary", "zero", "activation"),
    Operator("sigmoid special_expit", "Sigmoid", "unary", "", "activation nonnegative integer"),
    Operator("hardsigmoid", "HardSigmoid", "unary", "", "activation nonnegative"),
    Operator("softplus", "Softplus", "unary", "", "activation"),
    Operator("log_sigmoid", "", "unary"),
    Operator("rrelu", "", "unary", "zero"),
    Operator("hardshrink softshrink", "Shrink", "unary", "zero"),
    Operator("threshold", "", "unary", "number"),
    Operator("", "ThresholdedRelu", "unary", "zero"),
    Operator("prelu", "PRelu", "prelu", "zero"),
    Operator("glu", "", "glu", "zero"),
    # Functions of one operand, entry by entry.
    Operator("neg negative", "Neg", "unary", "zero", "arithmetic"),
    Operator("abs absolute", "Abs", "unary", "zero", "arithmetic nonnegative"),
    Operator("exp", "Exp", "unary", "", "arithmetic nonnegative"),
    Operator("log", "Log", "unary", "", "arithmetic"),
    Operator("sqrt", "Sqrt", "unary", "zero", "arithmetic"),
    Operator("rsqrt", "", "unary"),
    Operator("reciprocal", "Reciprocal", "unary", "", "arithmetic"),
    Operator("square", "", "unary", "zero"),
    Operator("erf", "Erf", "unary", "zero"),
    Operator("log1p expm1 log2 log10 exp2 erfc logit", "", "unary"),
    Operator("trunc frac sgn", "", "unary", "zero"),
    Operator("sin", "Sin", "unary", "zero", "arithmetic"),
    Operator("", "Tan Asin Atan Sinh Asinh Atanh", "unary", "zero"),
    Operator("", "Acos Acosh Cosh IsInf", "unary"),
    Operator("cos", "Cos", "unary", "", "arithmetic"),
    Operator("sign", "Sign", "unary", "zero", "arithmetic"),
    Operator("floor", "Floor", "unary", "zero", "arithmetic"),
    Operator("ceil", "Ceil", "unary", "zero", "arithmetic"),
    Operator("round", "Round", "unary", "zero", "arithmetic"),
    Operator("logical_not", "Not", "unary"),
    Operator("isnan", "IsNaN", "unary"),
    Operator("zeros_like", "", "unary", "zero"),
    Operator("ones_like full_like", "", "unary"),
    # Operators that change nothing, or the type alone.
    Operator("clone contiguous detach alias", "Identity", "unary", "zero", "activation layout moves arithmetic"),
    Operator("lift_fresh_copy positive", "", "unary", "zero", "activation layout"),
    Operator("to _to_copy", "Cast", "unary", "zero", "layout arithmetic"),
    Operator("type_as", "CastLike", "unary", "zero", "layout"),
    Operator("dropout feature_dropout alpha_dropout", "Dropout", "unary", "zero", "activation"),
    Operator("feature_alpha_dropout", "", "unary", "zero", "activation"),
    # Functions of several operands, entry by entry, with broadcasting.
    Operator("add", "Add", "combine", "sum", "integer arithmetic limit"),
    Operator("", "Sum", "combine", "sum", "arithmetic"),
    Operator("", "Mean", "combine", "sum"),
    Operator("", "And Or Xor", "combine"),
    Operator("sub rsub subtract", "Sub", "combine", "sum", "arithmetic limit"),
    Operator("mul multiply", "Mul", "combine", "mul", "integer arithmetic"),
    Operator("div true_divide divide", "Div", "combine", "zero", "arithmetic"),
    Operator("maximum max.other clamp_min.Tensor", "Max", "combine", "", "arithmetic limit"),
    Operator("minimum min.other clamp_max.Tensor", "Min", "combine", "", "arithmetic limit"),
    Operator("clamp.Tensor clip.Tensor", "", "combine"),
    Operator("where", "Where", "combine", "choice", "arithmetic limit"),
    Operator("masked_fill", "", "combine", "number"),
    Operator("pow", "Pow", "combine", "number", "arithmetic"),
    Operator("fmod remainder", "Mod", "combine", "zero", "arithmetic"),
    Operator("floor_divide", "", "combine", "zero"),
    Operator("lerp addcmul addcdiv logaddexp", "", "combine"),
    Operator("eq", "Equal", "combine", "", "arithmetic"),
    Operator("ne", "", "combine"),
    Operator("gt", "Greater", "combine", "", "arithmetic"),
    Operator("ge", "GreaterOrEqual", "combine", "", "arithmetic"),
    Operator("lt", "Less", "combine", "", "arithmetic"),
    Operator("le", "LessOrEqual", "combine", "", "arithmetic"),
    # Layers with weights, and norms.
    Operator("conv1d conv2d conv3d", "Conv", "conv", weights=_CONV),
    Operator("conv_transpose1d conv_transpose2d conv_transpose3d", "ConvTranspose", "conv", "", "no_bf16", weights=_CONV),  # noqa: E501
    Operator("linear", "Gemm", "linear", weights=_CONV),
    Operator("addmm", "", "addmm", weights=("mat2", "self")),
    Operator("matmul", "MatMul", "matmul", weights=("other",)),
    Operator("mm", "", "matmul", weights=("mat2",)),
    Operator("bmm", "", "matmul"),
    Operator("baddbmm", "", "addmm"),
    Operator("einsum", "Einsum", "einsum"),
    Operator("scaled_dot_product_attention", "Attention", "sdpa"),
    Operator("embedding", "", "embedding"),
    Operator("lstm", "LSTM", "lstm"),
    Operator("gru", "GRU", "lstm"),
    Operator("rnn_tanh rnn_relu", "RNN", "lstm"),
    Operator("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", "", "cell"),
    Operator("batch_norm", "BatchNormalization", "batch_norm", "", "norm"),
    Operator("instance_norm", "InstanceNormalization", "instance_norm", "", "norm"),
    Operator("group_norm", "GroupNormalization", "group_norm", "", "norm"),
    Operator("layer_norm", "LayerNormalization", "layer_norm", "", "norm"),
    Operator("rms_norm", "RMSNormalization SimplifiedLayerNormalization", "rms_norm", "", "norm"),
    # Pooling, resizing and padding, beside the channels.
    Operator("max_pool1d max_pool2d max_pool3d", "MaxPool", "spatial", "zero", "moves"),
    Operator("max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices", "", "spatial", "zero"),
    Operator("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d", "GlobalMaxPool", "spatial", "zero"),
    Operator("avg_pool1d avg_pool2d avg_pool3d", "AveragePool", "spatial", "zero", "average integer"),
    Operator("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", "GlobalAveragePool", "spatial", "zero", "average integer"),  # noqa: E501
    Operator("", "LpPool GlobalLpPool", "spatial", "zero"),
    Operator("", "GridSample", "grid_sample", "zero"),
    Operator("upsample_nearest1d upsample_nearest2d upsample_nearest3d", "Resize", "spatial", "zero", "moves"),
    Operator("_upsample_nearest_exact1d _upsample_nearest_exact2d", "", "spatial", "zero"),
    Operator("upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d", "", "spatial", "zero"),
    Operator("", "Upsample", "spatial", "zero"),
    Operator("pad constant_pad_nd", "Pad", "pad", "number", "limit"),
    Operator("reflection_pad1d reflection_pad2d replication_pad2d", "", "pad", "zero"),
    # Sums, means, maxima and operators that mix one axis.
    Operator("mean", "ReduceMean", "statistic", "zero"),
    Operator("sum", "ReduceSum", "statistic", "zero", "arithmetic"),
    Operator("std var", "", "statistic", "zero"),
    Operator("amax", "ReduceMax", "reduce", "zero", "arithmetic"),
    Operator("amin", "ReduceMin", "reduce", "zero", "arithmetic"),
    Operator("max min", "", "reduce", "zero"),
    Operator("logsumexp", "ReduceLogSumExp", "reduce"),
    Operator("prod", "ReduceProd", "reduce", "", "arithmetic"),
    Operator("norm linalg_vector_norm", "ReduceL1 ReduceL2", "statistic", "zero"),
    Operator("", "ReduceSumSquare", "statistic", "zero"),
    Operator("", "ReduceLogSum", "reduce"),
    Operator("", "ArgMax ArgMin", "arg"),
    Operator("", "TopK", "top"),
    Operator("", "LpNormalization", "lp_norm"),
    Operator("", "Trilu", "trilu", "zero"),
    Operator("softmax _softmax", "Softmax", "along", "", "nonnegative"),
    Operator("log_softmax", "LogSoftmax", "along"),
    Operator("cumsum", "CumSum", "along", "", "arithmetic"),
    # Operators that move channels about and compute nothing.
    Operator("view reshape flatten unflatten squeeze unsqueeze _unsafe_view", "Reshape Flatten Squeeze Unsqueeze", "reshape", "zero", "layout moves arithmetic"),  # noqa: E501
    Operator("permute transpose t swapaxes swapdims movedim moveaxis numpy_T", "Transpose", "permute", "zero", "layout moves arithmetic"),  # noqa: E501
    Operator("expand broadcast_to", "Expand", "expand", "zero", "layout arithmetic"),
    Operator("repeat", "Tile", "repeat", "zero", "layout arithmetic"),
    Operator("expand_as view_as reshape_as", "", "like", "zero"),
    Operator("cat concat concatenate", "Concat", "cat", "sum", "integer arithmetic"),
    Operator("chunk split split_with_sizes", "Split", "split", "zero", "moves arithmetic"),
    Operator("slice", "Slice", "slice", "zero", "moves arithmetic"),
    Operator("narrow", "", "narrow", "zero"),
    Operator("select", "Gather", "select", "zero", "arithmetic"),
    Operator("index", "GatherND", "index", "zero"),
    Operator("index_select", "", "index_select", "zero"),
    Operator("unbind", "", "unbind", "zero"),
    Operator("stack", "", "stack", "sum"),
    Operator("view.dtype where.default narrow.Tensor", "", ""),
    Operator("roll", "", "roll", "zero"),
    Operator("flip", "", "flip", "zero"),
    Operator("pixel_shuffle", "DepthToSpace", "pixel_shuffle", "zero", "moves"),
    Operator("pixel_unshuffle", "SpaceToDepth", "pixel_unshuffle", "zero", "moves"),
    Operator("channel_shuffle", "", "channel_shuffle", "zero"),
    # Values of a fixed size.
    Operator("ones zeros full empty new_zeros new_ones new_full new_empty", "ConstantOfShape", "full"),
    Operator("sym_size scalar_tensor", "Shape Constant", "fixed"),
    Operator("arange", "Range", "fixed", "", "arithmetic"),
)  # fmt: skip

UNKNOWN = Operator("", "", "")
STANDARD = ("", "ai.onnx")  # domains
ALIKE = (("com.microsoft", "Gelu"),)  # computes what the standard one does
ATEN: dict[str, Operator] = {name: row for row in ROWS for name in row.aten.split()}
ONNX: dict[str, Operator] = {name: row for row in ROWS for name in row.onnx.split()}


def aten_operator(name: str) -> Operator:
    """The row of an ATen name, `UNKNOWN` if it has none."""
    return ATEN.get(name, UNKNOWN)


def onnx_operator(name: str, domain: str = "") -> Operator:
    """The row of an ONNX operator type, `UNKNOWN` if it has none; one of another domain is another operator."""
    return ONNX.get(name, UNKNOWN) if domain in STANDARD or (domain, name) in ALIKE else UNKNOWN


def onnx_with(trait: str) -> frozenset[str]:
    """The ONNX operator types that have a trait."""
    assert trait in TRAITS, trait
    return frozenset(name for name, row in ONNX.items() if row.is_a(trait))
