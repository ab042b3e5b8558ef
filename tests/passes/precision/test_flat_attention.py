"""Attention in one operator: it computes the same after a cut, and what only looks like it stays as it is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_file import finalize
from sluice.passes.graph.onnx_flat_cores import find_flat_cores
from sluice.passes.graph.onnx_flat_operands import BATCH_FIRST
from sluice.passes.precision.flat_attention import MOST, has_marked_cores, with_flat_attention, with_marked_cores
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.pieces.partition import partition_graph
from sluice.runtime.base.compare import assert_close
from tests.exported import named_sequence, ops, random_feeds, run
from tests.networks import random_kept
from tests.sequences import sequence


@pytest.mark.parametrize(
    ("name", "q", "k"),
    [
        ("fused", 2, 2), ("multihead, positions first", 4, 4), ("bmm", 2, 2), ("masked", 2, 2), ("cross", 4, 4),
        ("grouped, expanded", 2, 1),
    ],
)  # fmt: skip
def test_cut_networks_compute_the_same(name: str, q: int, k: int) -> None:
    model, inputs = sequence(name)
    exported = with_marked_cores(to_onnx(model, inputs), 1)
    analysis = analyze_onnx(exported)
    cut = finalize(rewrite_onnx(exported, make_plan(analysis, random_kept(analysis, 0))))
    flat = with_flat_attention(cut)
    onnx.checker.check_model(flat, full_check=True)
    assert ops(flat)["Attention"] == 1 and ops(flat)["Softmax"] == 0
    (node,) = (node for node in flat.graph.node if node.op_type == "Attention")
    assert {a.name: a.i for a in node.attribute if a.name.endswith("heads")} == {"q_num_heads": q, "kv_num_heads": k}
    for batch in (3, 2):
        feeds = {i.name: x.numpy()[:batch] for i, x in zip(cut.graph.input, inputs, strict=True)}
        assert_close(run(flat, feeds), run(cut, feeds), 1e-5)


def test_pieces_have_the_form_of_the_network_and_a_key_of_their_own() -> None:
    exported = named_sequence("fused")
    marked = with_marked_cores(exported, 1)
    plain, flat = (partition_graph(model, 1) for model in (exported, marked))
    cores = [[p for p in each.pieces if ops(p.model)["Softmax"]] for each in (plain, flat)]
    ((before,), (after,)) = cores
    assert before.key != after.key
    assert {p.key for p in plain.pieces} - {before.key} == {p.key for p in flat.pieces} - {after.key}
    assert to_precision(before.model, "fp32", part=True) is before.model
    written = to_precision(after.model, "fp32", part=True)
    assert ops(written) == {"Split": 1, "Attention": 1}
    feeds = random_feeds(written)
    assert_close(run(written, feeds), run(after.model, feeds), 1e-5)


def test_marked_for_one_thread_of_a_cpu_alone() -> None:
    marked = with_marked_cores(named_sequence("fused"), 1)
    assert has_marked_cores(marked) and marked.opset_import[0].version == 23
    assert ops(to_precision(marked, "fp32"))["Attention"] == 1
    for target, threads in (("ort-cpu", 2), ("openvino", 1), ("tensorrt", 1)):
        assert ops(to_precision(marked, "fp32", target=target, threads=threads))["Attention"] == 0


QUERY = "r = Reshape(x, s) q = Transpose<perm=[0, 2, 1, 3]>(r)"
KEYS = "t = Reshape(y, s) k = Transpose<perm=[0, 2, 3, 1]>(t)"
VALUES = "u = Reshape(z, s) v = Transpose<perm=[0, 2, 1, 3]>(u)"
SCORES = "a = MatMul(q, k) c = Mul(a, f)"
SOFT = "w = Softmax<axis=3>(c)"
CONTEXT = "m = MatMul(w, v) p = Transpose<perm=[0, 2, 1, 3]>(m) o = Reshape(p, g)"


def core(
    query: str = QUERY, keys: str = KEYS, values: str = VALUES, scores: str = SCORES, soft: str = SOFT,
    context: str = CONTEXT, outputs: str = "float[B, 5, 6] o", opset: int = 23, **constants: np.ndarray,
) -> onnx.ModelProto:  # fmt: skip
    """Attention of three heads of two dimensions over five positions, in ONNX's own notation."""
    inputs = "float[B, 5, 6] x, float[B, 5, 6] y, float[B, 5, 6] z, float[5, 5] given"
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> test ({inputs}) => ({outputs}) '
        f"{{ {query} {keys} {values} {scores} {soft} {context} }}"
    )
    held: dict[str, np.ndarray] = {
        "s": np.array([0, 5, 3, 2]), "g": np.array([0, 5, 6]), "f": np.array(0.7, np.float32), **constants,
    }  # fmt: skip
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in held.items() if k in read)
    onnx.checker.check_model(model, full_check=True)
    return model


HIDING = np.where(np.tril(np.ones((5, 5))), 0.0, -np.inf).astype(np.float32)
BLIND = np.where(np.arange(5)[:, None] == 2, np.finfo(np.float32).min, HIDING)
MASKED = "a = MatMul(q, k) e = Mul(a, f) c = Add(e, mask)"
KEPT = {
    "plain": core(),
    "mask": core(scores=MASKED, mask=HIDING),
    "mask of heads": core(scores=MASKED, mask=np.linspace(-1, 1, 75, dtype=np.float32).reshape(1, 3, 5, 5)),
    "scale in front": core(query=f"x2 = Mul(x, f) {QUERY.replace('(x', '(x2')}", scores="c = MatMul(q, k)"),
    "divided": core(scores="a = MatMul(q, k) c = Div(a, f)"),
    "negative axis, unmarked": core(soft=SOFT.replace("3", "-1")),
}
LOOKALIKES = {
    "softmax over queries": core(soft=SOFT.replace("3", "2")),
    "weights read again": core(outputs="float[B, 5, 6] o, float[B, 3, 5, 5] w"),
    "weights read twice": core(context=f"{CONTEXT} again = ReduceSum<keepdims=0>(w)",
                               outputs="float[B, 5, 6] o, float again"),
    "scores read again": core(outputs="float[B, 5, 6] o, float[B, 3, 5, 5] a"),
    "dropout": core(soft=f"{SOFT} w2 = Dropout(w)", context=CONTEXT.replace("(w", "(w2")),
    "weights scaled": core(soft=f"{SOFT} w2 = Mul(w, f)", context=CONTEXT.replace("(w", "(w2")),
    "a mask that is given": core(scores="a = MatMul(q, k) e = Mul(a, f) c = Add(e, given)"),
    "a mask that hides all": core(scores=MASKED, mask=BLIND),
    "a mask of positions alone": core(scores=MASKED, mask=HIDING[4]),
    "scaled behind the mask": core(scores="a = MatMul(q, k) e = Add(a, mask) c = Mul(e, f)", mask=HIDING),
    "a negative scale": core(f=np.array(-0.7, np.float32)),
    "a scale of every head": core(f=np.linspace(1, 2, 3, dtype=np.float32).reshape(3, 1, 1)),
    "heads outside": core(query="q = Reshape(x, s)", s=np.array([0, 3, 5, 2]), keys="t = Reshape(y, s) "
                          "k = Transpose<perm=[0, 1, 3, 2]>(t)", values="v = Reshape(z, s)"),
    "dimensions outside": core(query="r = Reshape(x, j) q = Transpose<perm=[0, 3, 1, 2]>(r)", j=np.array([0, 5, 2, 3])),
    "heads turned": core(query=f"{QUERY.replace('q =', 'q2 =')} q = Gather<axis=1>(q2, j)", j=np.array([2, 0, 1])),
    "some columns": core(query="x2 = Slice(x, zero, four, two) " + QUERY.replace("(x", "(x2").replace("s)", "l)"),
                         keys="y2 = Slice(y, zero, four, two) " + KEYS.replace("(y", "(y2").replace("s)", "l)"),
                         values="z2 = Slice(z, zero, four, two) " + VALUES.replace("(z", "(z2").replace("s)", "l)"),
                         outputs="float[B, 5, 4] o", l=np.array([0, 5, 2, 2]), g=np.array([0, 5, 4]),
                         zero=np.array([0]), four=np.array([4]), two=np.array([2])),
    "context not laid out": core(context="o = MatMul(w, v)", outputs="float[B, 3, 5, 2] o"),
    "context read before": core(outputs="float[B, 5, 6] o, float[B, 3, 5, 2] m"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_forms(name: str) -> None:
    model = KEPT[name]
    flat = with_flat_attention(model)
    assert ops(flat)["Attention"] == ("unmarked" not in name)
    if "unmarked" in name:
        assert len(find_flat_cores(model)) == 1
    feeds = random_feeds(model)
    assert_close(run(flat, feeds), run(model, feeds), 1e-5)


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_only_looks_like_it_stays(name: str) -> None:
    assert find_flat_cores(LOOKALIKES[name]) == []
    assert with_flat_attention(LOOKALIKES[name]) is LOOKALIKES[name]


def test_a_layout_that_is_not_told_apart_would_compute_something_else() -> None:
    """Without the question where entries come from, "dimensions outside" has the shapes of a core."""
    model, right = LOOKALIKES["dimensions outside"], core()
    feeds = random_feeds(model)
    assert np.abs(run(model, feeds)["o"] - run(with_flat_attention(right), feeds)["o"]).max() > 1e-2


def test_files_keep_their_opset() -> None:
    """An older one is written by `with_marked_cores` alone, where every operator means the same in both."""
    for opset in (17, 20, 22):
        old = core(opset=opset)
        assert not has_marked_cores(old) and with_flat_attention(old) is old
        assert (with_marked_cores(old, 1) is old) == (opset < 20)
    normed = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> test (float[1, 4, 5] x, float[2] s) => (float[1, 4, 5] o) '
        "{ o = GroupNormalization<num_groups=2>(x, s, s) }"
    )
    both = core(opset=20)
    both.graph.node.extend(normed.graph.node)
    assert with_marked_cores(both, 1) is both


def test_large_scores_stay() -> None:
    model = core(opset=20)
    batch = MOST // (3 * 5 * 5)
    assert has_marked_cores(with_marked_cores(model, batch))
    assert with_marked_cores(model, batch + 1) is model


def test_operands_are_told_by_their_columns() -> None:
    (found,) = find_flat_cores(with_marked_cores(named_sequence("fused"), 1))
    assert [(one.first, one.heads, one.order) for one in (found.q, found.k, found.v)] == [
        (0, 3, BATCH_FIRST), (found.q.dims * 3, 3, BATCH_FIRST), (found.q.dims * 6, 3, BATCH_FIRST)
    ]  # fmt: skip
    assert found.q.value == found.k.value == found.v.value
