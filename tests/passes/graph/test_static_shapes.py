"""Shape arithmetic is folded where it can be evaluated, and left where it cannot."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.models import enliven
from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.static_shapes import static_graph
from sluice.profiler.pieces.partition import anchor_weight, partition_graph
from sluice.runtime.base.compare import assert_close
from tests.exported import ops, run


class Embeddings(nn.Module):
    """Words, places and types as BERT adds them up; its buffers are longer than its input."""

    def __init__(self, places: int):
        super().__init__()
        self.words, self.places, self.types = nn.Embedding(11, 10), nn.Embedding(places, 10), nn.Embedding(3, 10)
        self.norm, self.up, self.down = nn.LayerNorm(10), nn.Linear(10, 13), nn.Linear(13, 4)
        self.register_buffer("position_ids", torch.arange(places)[None])
        self.register_buffer("token_type_ids", torch.arange(places)[None] % 3)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        places = self.position_ids[:, :length]
        types = torch.gather(self.token_type_ids.expand(places.shape[0], -1), 1, places).expand(batch, length)
        x = self.norm(self.words(ids) + self.types(types) + self.places(places))
        return self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("places", [9, 20, 75, 512])
def test_positions_beyond_the_input(places: int) -> None:
    ids = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(0))
    model = enliven(Embeddings(places), 0, (ids,))
    exported = to_onnx(model, ids)
    static = static_graph(exported, 3)
    assert ops(exported)["GatherElements"] == 1 and not ops(static).keys() & {"GatherElements", "Shape"}
    with torch.no_grad():
        assert_close(list(run(static, {"ids": ids.numpy()}).values()), [model(ids)])
    assert anchor_weight(partition_graph(exported, 3).pieces[-1]) == "down.weight"


def folding(op: str, data: list[np.ndarray], outputs: int = 1, domain: str = "", **attributes: int) -> onnx.ModelProto:
    """``y = x +`` the joined outputs of an operator on constants."""
    given, names = [f"i{k}" for k in range(len(data))], [f"o{k}" for k in range(outputs)]
    nodes = [
        helper.make_node(op, given, names, "folded", domain=domain, **attributes),
        helper.make_node("Concat", names, ["s"], axis=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["n", 1, 1])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)
    tensors = [numpy_helper.from_array(array, name) for name, array in zip(given, data, strict=True)]
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(4, 70), (2, 70), (4, 3), (1, 1), (3, 5)])
def test_gather_elements(axis: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    data = rng.integers(-99, 99, (4, 70))
    indices = rng.integers(-data.shape[axis], data.shape[axis], shape)
    model = folding("GatherElements", [data, indices], axis=axis)
    static = static_graph(model, 2)
    assert ops(static) == {"Add": 1}
    feeds = {"x": np.zeros((2, 1, 1), np.int64)}
    np.testing.assert_array_equal(run(static, feeds)["y"], run(model, feeds)["y"])


def test_all_outputs_are_folded() -> None:
    model = folding("Split", [np.arange(5)], outputs=2, num_outputs=2)
    static = static_graph(model, 2)
    assert ops(static) == {"Add": 1}
    np.testing.assert_array_equal(run(static, {"x": np.zeros((2, 1, 1), np.int64)})["y"][0, 0], np.arange(5))


def test_what_cannot_be_evaluated_stays() -> None:
    model = folding("Mystery", [np.arange(5)], domain="nobody")
    assert ops(static_graph(model, 2)) == {"Mystery": 1, "Concat": 1, "Add": 1}
