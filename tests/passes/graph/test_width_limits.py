"""Least widths and multiples, by pattern; layers left alone by their type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import nn

import sluice
from sluice.artifacts.report_text import _marks
from sluice.commands.options import kept, multiple_of
from sluice.core.errors import SluiceError
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture
from sluice.passes.graph.exclusion_torch import named_by_type
from sluice.passes.graph.width_limits import WidthLimit, WidthLimits
from sluice.passes.search_space import find_search_space, read_onnx
from tests import tiny


def limits(**given: Any) -> dict[int, WidthLimit]:
    """By the size of the group: conv1 makes 10 channels, conv2 13."""
    analysis = analyze(capture(tiny.model(), tiny.inputs()))
    sizes = {group.name: group.size for group in analysis.groups}
    return {sizes[name]: limit for name, limit in WidthLimits(**given).of(analysis).items()}


def test_what_is_asked_of_a_group() -> None:
    assert limits() == {}
    assert limits(keep={"conv1": 0.5}) == {10: WidthLimit(5)}
    assert limits(keep={"*": 0.51}) == {10: WidthLimit(6), 13: WidthLimit(7)}
    assert limits(keep={"conv*": 4, "conv2": 99}, multiple={"conv1.weight": 2, "*": 3}) == {
        10: WidthLimit(4, 6), 13: WidthLimit(13, 3),
    }  # fmt: skip
    assert WidthLimit(5, 3).allowed((2, 3, 5, 6, 9, 13)) == (6, 9, 13)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": {"nothing": 0.5}}, "keep pattern 'nothing' matches no layer"),
        ({"multiple": {"nothing": 2}}, "multiple pattern 'nothing' matches no layer"),
        ({"keep": {"*": 1.5}}, "is no part of the channels"),
        ({"keep": {"*": 0}}, "is no part of the channels"),
        ({"keep": {"*": True}}, "is no part of the channels"),
        ({"multiple": {"*": 0}}, "give a whole number"),
        ({"multiple": {"*": 2.0}}, "give a whole number"),
        ({"keep": ["*"]}, "is no mapping from layers"),
    ],
)
def test_what_cannot_be_asked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SluiceError, match=message):
        limits(**given)


def compressed(folder: Path, budget: str = "60%", **more: Any) -> sluice.Compressed:
    with tiny.simulated_device():
        return sluice.compress(
            tiny.model(), tiny.inputs(), budget=budget, data=tiny.data(), batch=tiny.BATCH, epochs=0,
            out=folder / "out", progress=False, methods=("filter",), **more,
        )  # fmt: skip


def widths(plan: sluice.Plan) -> dict[str, int]:
    return {s.param: len(s.keep) for s in plan.slices if s.axis == 0 and s.param.endswith("weight")}


def test_plans_keep_to_it(tmp_path: Path) -> None:
    free = widths(compressed(tmp_path).plan)
    assert free["conv1.weight"] % 3 or free["conv2.weight"] % 3
    found = widths(compressed(tmp_path, multiple={"*": 3}).plan)
    assert found and all(width % 3 == 0 for width in found.values())
    found = widths(compressed(tmp_path, budget="75%", keep={"conv1": 1.0}).plan)
    assert "conv1.weight" not in found and found["conv2.weight"] < 13
    with pytest.raises(SluiceError, match=r"fastest|reach"):
        compressed(tmp_path, budget="30%", keep={"*": 0.9})


def test_a_file_keeps_to_it_as_well(tmp_path: Path) -> None:
    dense = tiny.dense_onnx_in(tmp_path)
    examples = {onnx.load(dense).graph.input[0].name: np.concatenate([tiny.inputs(32).numpy()] * 2)}
    with tiny.simulated_device():
        done = sluice.compress_onnx(
            dense, examples, budget="70%", batch=tiny.BATCH, multiple={"*": 3}, methods=("filter",), progress=False
        )
    found = widths(done.plan)
    assert found and all(width % 3 == 0 for width in found.values())


def test_layers_by_their_type() -> None:
    model = tiny.model()
    assert named_by_type(model, ["a*", nn.Linear, "type:Conv2d"]) == ["a*", "fc", "conv1", "conv2"]
    assert named_by_type(model, ["type:_ConvNd"]) == ["conv1", "conv2"]
    for wrong, message in ((nn.LSTM, "means no module"), ("type:ReLU", "means no module"), (3, "is no layer")):
        with pytest.raises(SluiceError, match=message):
            named_by_type(model, [wrong])


def test_type_leaves_them_alone(tmp_path: Path) -> None:
    with pytest.raises(SluiceError):
        compressed(tmp_path, exclude=[nn.Conv2d])
    dense = onnx.load(tiny.dense_onnx_in(tmp_path))
    assert find_search_space(read_onnx(dense)).analysis.groups
    assert not find_search_space(read_onnx(dense), ["type:Conv"]).analysis.groups
    with pytest.raises(SluiceError, match="means no operator"):
        find_search_space(read_onnx(dense), ["type:LSTM"])


def test_words_of_the_command_line() -> None:
    assert kept("conv1=0.5") == ("conv1", 0.5) and kept("16") == ("*", 16) and kept("a=b=3") == ("a=b", 3)
    assert multiple_of("8") == ("*", 8) and multiple_of("conv*=4") == ("conv*", 4)


def test_a_budget_that_is_met_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tiny.simulated_device():
        done = sluice.compress(
            tiny.model(), tiny.inputs(), budget="1000ms", data=tiny.data(), batch=tiny.BATCH, epochs=5, progress=True,
        )  # fmt: skip
    assert not done.plan.edited() and done.report.met()
    assert "within 1000 ms already: nothing is cut" in capsys.readouterr().err
    assert "the dense network already fits; nothing was cut" in list(_marks(done.report))
    state = tiny.model().state_dict()
    assert all(bool((value == state[name]).all()) for name, value in done.module.state_dict().items())
