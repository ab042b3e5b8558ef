"""Files as others export them, each built here with one fault of the wild."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.wild_masked import masked
from sluice.core.errors import SluiceError
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.files.observe import session_of
from sluice.passes.files.opset import opset_of
from sluice.passes.files.read import OnnxFile, read_onnx_file, written_back
from sluice.passes.graph.groups import keep_masks
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_file import load_onnx
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.runtime.base.compare import relative_error

F, I64 = TensorProto.FLOAT, TensorProto.INT64
RNG = np.random.default_rng(0)


def info(name: str, *shape: int | str | None, kind: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def held(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name)


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


def constant(tensor: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [tensor.name], value=tensor)


def made(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    tensors: list[onnx.TensorProto],
    opset: int = 13,
    hints: list[onnx.ValueInfoProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "wild", inputs, outputs, tensors, value_info=hints)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = session_of(model)
    return list(session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()}))


def check_cut(model: onnx.ModelProto, file: OnnxFile, *feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Every other channel of every group goes, and the file computes what the original with zero columns does."""
    analysis = analyze_onnx(file.model)
    kept = {group.name: list(range(0, group.size, 2)) for group in analysis.groups}
    assert kept, analysis.frozen
    slim = written_back(file, rewrite_onnx(file.model, make_plan(analysis, kept)))
    reference = masked(file.model, analysis, keep_masks(analysis, kept))
    for feed in feeds:
        assert relative_error(run(file.model, feed), run(model, feed)) < 1e-6
        assert relative_error(run(slim, feed), run(reference, feed)) < 1e-5
        assert relative_error(run(reference, feed), run(model, feed)) > 1e-2
    return slim


def image(batch: int, height: int = 8, width: int = 12) -> dict[str, np.ndarray]:
    return {"x": RNG.standard_normal((batch, 3, height, width)).astype(np.float32)}


def two_convs(**more: object) -> onnx.ModelProto:
    """Weights in Constant nodes, stale shapes of inner values and of the output."""
    tensors = [held("a", 10, 3, 3, 3), held("a.bias", 10), held("b", 5, 10, 1, 1)]
    nodes = [
        *(constant(t) for t in tensors),
        helper.make_node("Conv", ["x", "a", "a.bias"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b"], ["y"]),
    ]
    return made(nodes, [info("x", None, 3, None, None)], [info("y", 1, 5, 4)], [], hints=[info("h", 1, 4, 2)])


def test_declared_shapes_are_hints_and_constants_are_weights() -> None:
    model = two_convs()
    before = model.SerializeToString()
    file = read_onnx_file(model)
    assert file.batch_is_open and set(file.sizes.values()) == {64, 96}
    slim = check_cut(model, file, image(2), image(3, 9, 5))
    assert model.SerializeToString() == before
    assert list(slim.graph.input) == list(model.graph.input) and list(slim.graph.output) == list(model.graph.output)
    assert {i.name: list(i.dims) for i in slim.graph.initializer}["b"] == [5, 5, 1, 1]


def test_sizes_come_from_examples() -> None:
    file = read_onnx_file(two_convs(), {"x": image(1, 20, 14)["x"]})
    assert sorted(file.sizes.values()) == [14, 20]
    with pytest.raises(SluiceError, match="has no input 'z'; its inputs are"):
        read_onnx_file(two_convs(), {"z": image(1)["x"]})


def test_targets_of_other_open_sizes_stay_open() -> None:
    """``(batch, time, 6) -> 6 -> 2 x 5 -> (batch, time, 10)`` with literal and computed targets."""
    tensors = [held("a", 6, 10), held("b", 10, 4), ints("t", 0, 0, 2, 5), ints("zero", 0), ints("two", 2)]
    tensors += [ints("ten", 10), ints("one", 1)]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Reshape", ["h", "t"], ["split"]),
        helper.make_node("Relu", ["split"], ["r"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "zero", "two"], ["lead"]),
        helper.make_node("Concat", ["lead", "ten"], ["target"], axis=0),
        helper.make_node("Reshape", ["r", "target"], ["joined"]),
        helper.make_node("MatMul", ["joined", "b"], ["y"]),
    ]
    model = made(nodes, [info("x", "n", "time", 6)], [info("y", "n", "time", 4)], tensors)
    feeds = [{"x": RNG.standard_normal((n, t, 6)).astype(np.float32)} for n, t in ((2, 7), (3, 11))]
    check_cut(model, read_onnx_file(model), *feeds)


def test_a_value_of_unknown_rank_is_learned_from_a_run() -> None:
    """The target of the reshape is data to inference: it is taken from a float input."""
    tensors = [held("a", 6, 8), held("b", 8, 4), numpy_helper.from_array(np.array([0, 2], dtype=np.int64), "pick")]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Cast", ["to"], ["target"], to=I64),
        helper.make_node("Reshape", ["h", "target"], ["g"]),
        helper.make_node("MatMul", ["g", "b"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"], axis=-1),
    ]
    inputs = [info("x", 4, 6), info("to", "rank")]
    model = made(nodes, inputs, [info("y", None, None)], tensors)
    to = np.array([4, 8], dtype=np.float32)
    file = read_onnx_file(model, {"x": RNG.standard_normal((4, 6)).astype(np.float32), "to": to})
    analysis = analyze_onnx(file.model)
    assert analysis.shapes["m"] == (4, 4)


def branches(
    condition: list[onnx.NodeProto], name: str, *more: onnx.TensorProto, inputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    def branch(letter: str) -> onnx.GraphProto:
        nodes = [
            constant(held(f"{letter}.1", 4, 6)),
            helper.make_node("MatMul", ["x", f"{letter}.1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", f"{letter}.2"], ["out"]),
        ]
        return helper.make_graph(nodes, letter, [], [info("out", None, 3)], [held(f"{letter}.2", 6, 3)])

    chosen = helper.make_node("If", [name], ["y"], then_branch=branch("then"), else_branch=branch("else"), name="fork")
    return made([*condition, chosen], [info("x", "n", 4), *inputs], [info("y", "n", 3)], list(more), 16)


def test_a_branch_whose_condition_is_fixed_is_the_graph() -> None:
    model = branches(
        [helper.make_node("Equal", ["sr", "rate"], ["is"])], "is", numpy_helper.from_array(np.array(16000), "rate"),
        inputs=[info("sr", kind=I64)],
    )  # fmt: skip
    feeds = [{"x": RNG.standard_normal((n, 4)).astype(np.float32), "sr": np.array(16000)} for n in (2, 5)]
    file = read_onnx_file(model, fixed={"sr": 16000})
    assert not [node for node in file.model.graph.node if node.op_type == "If"]
    assert "else.1" not in {init.name for init in file.model.graph.initializer}
    slim = check_cut(model, file, *feeds)
    assert [i.name for i in slim.graph.input] == ["x", "sr"]  # callers need no change
    other = read_onnx_file(model, fixed={"sr": 8000})
    assert "else.1" in {init.name for init in other.model.graph.initializer}
    with pytest.raises(SluiceError, match="nothing called 'rate' can be fixed"):
        read_onnx_file(model, fixed={"rate": 1})


def test_a_branch_that_data_choose_freezes_what_it_reads() -> None:
    model = branches([helper.make_node("Cast", ["flag"], ["is"], to=TensorProto.BOOL)], "is", inputs=[info("flag")])
    file = read_onnx_file(model)
    told = find_search_space(read_onnx(file.model)).left_alone
    for name in ("then.1", "then.2", "else.1", "else.2"):
        assert told[name] == "is read inside If, which runs by what is computed"


def test_a_condition_of_an_open_size_is_not_known() -> None:
    condition = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["rows"]),
        helper.make_node("Equal", ["rows", "two"], ["is"]),
    ]
    model = branches(
        condition, "is", numpy_helper.from_array(np.array(0), "first"), numpy_helper.from_array(np.array(2), "two"),
        inputs=[],
    )  # fmt: skip
    assert [n for n in read_onnx_file(model).model.graph.node if n.op_type == "If"]


def test_local_functions_are_written_out() -> None:
    body = [helper.make_node("MatMul", ["u", "w"], ["m"]), helper.make_node("Relu", ["m"], ["v"])]
    function = helper.make_function("own", "Layer", ["u", "w"], ["v"], body, [helper.make_opsetid("", 18)])
    nodes = [helper.make_node("Layer", ["x", "a"], ["h"], domain="own"), helper.make_node("MatMul", ["h", "b"], ["y"])]
    model = made(nodes, [info("x", "n", 5)], [info("y", "n", 3)], [held("a", 5, 8), held("b", 8, 3)], 18)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    feeds = [{"x": RNG.standard_normal((n, 5)).astype(np.float32)} for n in (2, 3)]
    check_cut(model, read_onnx_file(model), *feeds)


@pytest.mark.parametrize("opset", [9, 11, 12])
def test_old_operator_sets_come_back(opset: int) -> None:
    """Slice, Pad, Clip, Squeeze, Split, ReduceSum and Softmax have other forms in old sets."""
    tensors = [held("a", 8, 3, 1, 1), held("b", 4, 8)]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h0"]),
        helper.make_node("Clip", ["h0"], ["h"], min=-1.0, max=1.0)
        if opset < 11
        else helper.make_node("Clip", ["h0", "low", "high"], ["h"]),
        helper.make_node("Split", ["h"], ["s", "t"], axis=2, split=[3, 5]),
        helper.make_node("ReduceSum", ["t"], ["u"], axes=[2, 3], keepdims=1),
        helper.make_node("ReduceMean", ["s"], ["v"], axes=[2, 3], keepdims=1),
        helper.make_node("Add", ["u", "v"], ["w"]),
        helper.make_node("Squeeze", ["w"], ["z"], axes=[2, 3]),
        helper.make_node("Gemm", ["z", "b", "bias"], ["g"], transB=1),
        helper.make_node("Softmax", ["g"], ["y"]),
    ]
    tensors += [held("bias", 4)]
    if opset >= 11:
        tensors += [numpy_helper.from_array(np.array(v, dtype=np.float32), n) for n, v in (("low", -1), ("high", 1))]
    model = made(nodes, [info("x", "n", 3, 8, 12)], [info("y", "n", 4)], tensors, opset)
    file = read_onnx_file(model)
    assert opset_of(file.model) == 13
    slim = check_cut(model, file, image(2), image(5))
    assert opset_of(slim) == opset
    onnx.checker.check_model(slim, full_check=True)


def test_softmax_of_old_sets_is_over_all_axes_behind_one() -> None:
    model = made(
        [helper.make_node("Softmax", ["x"], ["y"], axis=1)], [info("x", 2, 3, 8, 12)], [info("y", 2, 3, 8, 12)], [], 11
    )
    file = read_onnx_file(model)
    assert relative_error(run(file.model, image(2)), run(model, image(2))) > 0.1  # other images
    feed = image(2)
    assert relative_error(run(file.model, feed), run(model, feed)) < 1e-6


def test_a_batch_of_one_is_fixed() -> None:
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("Reshape", ["h", "t"], ["r"])]
    nodes += [helper.make_node("MatMul", ["r", "b"], ["y"])]
    tensors = [held("a", 4, 8), held("b", 8, 3), ints("t", 1, 8)]
    model = made(nodes, [info("x", "n", 4)], [info("y", 1, 3)], tensors)
    file = read_onnx_file(model)
    assert not file.batch_is_open
    check_cut(model, file, {"x": RNG.standard_normal((1, 4)).astype(np.float32)})


def test_weights_beside_the_file(tmp_path: Path) -> None:
    model = made(
        [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])],
        [info("x", "n", 40)], [info("y", "n", 30)], [held("a", 40, 50), held("b", 50, 30)],
    )  # fmt: skip
    place = tmp_path / "model.onnx"
    onnx.save_model(model, place, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    model = onnx.load(place)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    feed = {"x": RNG.standard_normal((3, 40)).astype(np.float32)}
    check_cut(model, read_onnx_file(place), feed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("what", ["linked", "gone", "short"])
def test_weights_beside_the_file_that_are_not_read(what: str, tmp_path: Path) -> None:
    model = made([helper.make_node("MatMul", ["x", "a"], ["y"])], [info("x", 3, 40)], [info("y", 3, 50)],
                 [held("a", 40, 50)])  # fmt: skip
    place, weights = tmp_path / "model.onnx", tmp_path / "weights"
    onnx.save_model(model, place, save_as_external_data=True, location=weights.name, size_threshold=0)
    if what == "linked":
        (tmp_path / "other").hardlink_to(weights)
    elif what == "gone":
        weights.unlink()
    else:
        weights.write_bytes(b"")
    with pytest.raises(SluiceError, match=r"cannot read the weights beside '.*model.onnx' \(.*\); give it with plain"):
        read_onnx_file(place)
    with pytest.raises(SluiceError, match="cannot read the weights beside"):
        load_onnx(place)


def test_one_sentence_for_what_is_not_read(tmp_path: Path) -> None:
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])]
    quantised = made(nodes, [info("x", 2, 3)], [info("q", 2, 3, kind=TensorProto.UINT8)], [])
    with pytest.raises(SluiceError, match=r"is quantised \(it holds DynamicQuantizeLinear\); give the file in float32"):
        read_onnx_file(quantised)
    with pytest.raises(SluiceError, match="ONNX Runtime does not load it"):
        read_onnx_file(made([helper.make_node("Nothing", ["x"], ["y"])], [info("x", 2)], [info("y", 2)], []))
    with pytest.raises(SluiceError, match="opset 5; export it again"):
        read_onnx_file(made([helper.make_node("Relu", ["x"], ["y"])], [info("x", 2)], [info("y", 2)], [], 5))
    (tmp_path / "x.onnx").write_bytes(b"no file")
    with pytest.raises(SluiceError, match="is not an ONNX file"):
        read_onnx_file(tmp_path / "x.onnx")
    with pytest.raises(SluiceError, match="cannot read"):
        read_onnx_file(tmp_path / "none.onnx")


@pytest.mark.parametrize("opset, groups", [(18, 2), (21, 2), (21, 8)])
def test_a_group_norm_is_cut_within_its_groups(opset: int, groups: int) -> None:
    """onnx infers no shape behind it. Half of every group is kept, or half of all where a group is one channel."""
    size = groups if opset == 18 else 8
    model = made(
        [
            helper.make_node("Conv", ["x", "a"], ["p"], pads=[1, 1, 1, 1]),
            helper.make_node("GroupNormalization", ["p", "s", "t"], ["q"], num_groups=groups, epsilon=0.01),
            helper.make_node("Relu", ["q"], ["r"]),
            helper.make_node("Conv", ["r", "b"], ["y"]),
        ],
        [info("x", "n", 3, "h", "w")], [info("y", "n", 5, "h", "w")],
        [held("a", 8, 3, 3, 3), held("s", size), held("t", size), held("b", 5, 8, 1, 1)], opset,
    )  # fmt: skip
    file = read_onnx_file(model)
    feed = image(2)
    assert relative_error(run(file.model, feed), run(model, feed)) < 1e-6
    analysis = analyze_onnx(file.model)
    (group,) = analysis.groups
    plan = make_plan(analysis, {group.name: range(0, group.size, 2)})
    slim, kept = written_back(file, rewrite_onnx(file.model, plan)), [0, 2, 4, 6]
    own = onnx.ModelProto()
    own.CopyFrom(model)
    for init in own.graph.initializer:
        values = numpy_helper.to_array(init)
        if init.name == "b":
            values = values[:, kept]
        elif values.shape[0] == 8:
            values = values[kept]
        init.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), init.name))
    next(a for a in own.graph.node[1].attribute if a.name == "num_groups").i = min(groups, 4)
    assert relative_error(run(slim, feed), run(own, feed)) < 1e-5
    assert relative_error(run(own, feed), run(model, feed)) > 1e-2
