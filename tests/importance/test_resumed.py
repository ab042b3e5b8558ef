"""A changed file gives the outputs of the whole file, though only what the change touches is run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sluice.core.plan import Edits
from sluice.core.weight_bytes import Apart
from sluice.importance import resumed
from sluice.importance.output_distance import OutputDistance, outputs_of
from sluice.importance.resumed import Resumed
from sluice.passes.cut.rewrite_onnx import cut_graph, restructure
from sluice.passes.files.read import OnnxFile
from sluice.passes.files.rows import Rows
from sluice.passes.graph.groups import keep_masks
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def given() -> tuple[OnnxFile, Rows]:
    """More examples than one batch holds, so that the last batch is smaller."""
    return tiny.plain_file_and_rows(35)


def changes(model: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """Every group cut to half, and every block dropped."""
    space = find_search_space(read_onnx(model))
    analysis = space.analysis
    found = {
        group.name: cut_graph(model, analysis, keep_masks(analysis, {group.name: list(range(group.size // 2))}))
        for group in analysis.groups
    }
    found |= {f"drop {k}": restructure(model, Edits(drops=(block.drop(),))) for k, block in enumerate(space.blocks)}
    return found


@pytest.mark.parametrize("limit", [resumed.LIMIT, 0])
def test_every_change_gives_the_outputs_of_the_whole_file(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumed, "LIMIT", limit)
    file, rows = given()
    walk, made = Resumed(file.model, rows), changes(file.model)
    assert len(made) >= 4
    for turn in (list(made), list(made)[::-1]):  # in the order of the graph and against it
        for name in turn:
            want, have = outputs_of(made[name], rows), walk.outputs(made[name])
            assert have.keys() == want.keys()
            assert_close(list(have.values()), list(want.values()), 1e-6)


def test_another_weight_gives_the_outputs_of_the_file_that_holds_it() -> None:
    file, rows = given()
    walk, rng = Resumed(file.model, rows), np.random.default_rng(0)
    for name, init in OnnxGraph(file.model).initializers.items():
        if len(init.dims) < 2 or init.data_type != onnx.TensorProto.FLOAT:
            continue
        for _ in range(2):
            value = rng.standard_normal(tuple(init.dims)).astype(np.float32)
            changed = onnx.ModelProto()
            changed.CopyFrom(file.model)
            OnnxGraph(changed).initializers[name].CopyFrom(numpy_helper.from_array(value, name))
            want = outputs_of(changed, rows)
            assert_close(list(walk.outputs_with(name, value).values()), list(want.values()), 1e-5)
            assert_close(list(walk.outputs(changed).values()), list(want.values()), 1e-5)


def test_operators_before_a_change_do_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    file, rows = given()
    walk, sizes = Resumed(file.model, rows), list[int]()
    real = OrtRunner.of_apart

    def build(self: OrtRunner, model: Apart) -> object:
        sizes.append(len(model.light.graph.node))
        return real(self, model)

    monkeypatch.setattr(OrtRunner, "of_apart", build)
    analysis = analyze_onnx(file.model)
    last = max(analysis.groups, key=lambda group: walk.position(ref.param for ref in group.refs))
    for width in (3, 2):
        walk.outputs(cut_graph(file.model, analysis, keep_masks(analysis, {last.name: list(range(width))})))
    before, behind, again = sizes
    assert before + behind <= len(file.model.graph.node) and again == behind < len(file.model.graph.node) / 2
    assert walk.outputs(file.model) is walk.reference


def test_a_distance_is_the_same_either_way() -> None:
    file, rows = given()
    distance = OutputDistance(file.model, rows)
    for name, made in changes(file.model).items():
        whole = distance._mean(outputs_of(made, rows))
        assert distance.of(made) == pytest.approx(whole, rel=1e-4), name
        assert whole > 1e-4, name
