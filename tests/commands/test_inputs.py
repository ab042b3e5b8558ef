"""Networks of several inputs, of integers and masks, on the command line; factories with arguments."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from sluice.cli import main, parser
from sluice.commands import options
from sluice.commands.input_options import named_input
from sluice.commands.specs import inputs_of, model_of
from sluice.core.errors import SluiceError

SPEC = "tests.commands.test_inputs:tokens"


class Tokens(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.up, self.head = nn.Embedding(30, 6), nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, ids: Tensor, *, mask: Tensor) -> Tensor:
        return self.head((self.up(self.table(ids)).relu() * mask[..., None]).sum(1))


def tokens(width: int = 9, name: str = "") -> nn.Module:
    assert isinstance(name, str)
    return Tokens(width)


def test_inputs_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["--input", "ids=2,5:int64", "--input", "mask=2,5:bool"]
    assert main(["inspect", f"{SPEC}?width=13&name=first", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"]["up"]["size"] == 13
    assert main(["export", SPEC, *given, "--names", "-o", str(tmp_path / "t.onnx")]) == 0
    file = onnx.load(tmp_path / "t.onnx")
    assert [value.name for value in file.graph.input] == ["ids", "mask"]
    found = inputs_of(SPEC, None, 1, [named_input("ids=2,5:int64"), named_input("x=1,3")])
    assert isinstance(found, dict) and found["ids"].dtype == torch.int64 and found["x"].shape == (1, 3)


@pytest.mark.parametrize("word", ["ids", "=2,3", "ids=2,x", "ids=2,3:text"])
def test_words_that_are_no_inputs(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no (input|shape); (write|give)"):
        named_input(word)


def test_what_does_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    twice = [named_input("ids=2,5:int64")] * 2
    with pytest.raises(SluiceError, match="name every argument once"):
        inputs_of(SPEC, None, 1, twice)
    with pytest.raises(SluiceError, match="'a b', which no argument of forward"):
        inputs_of(SPEC, None, 1, [named_input("a b=2")])
    with pytest.raises(SluiceError, match="leave out --shape"):
        inputs_of(SPEC, (5,), 1, twice[:1])
    with pytest.raises(SluiceError, match="or every argument of forward\\(\\) by --input"):
        inputs_of(SPEC, None, 1)
    with pytest.raises(SluiceError, match="it is called with depth, mend it"):
        model_of(f"{SPEC}?depth=3")
    assert main(["inspect", SPEC, "--shape", "5"]) == 1
    assert "on the command line --input NAME=" in capsys.readouterr().err


def test_a_file_beyond_one_message_runs_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes and types say how large it is; its weights, beside it, are not read for that."""
    ends = [onnx.helper.make_tensor_value_info(name, 1, [2**15]) for name in "xy"]
    for name, rows in (("large", 2**15), ("small", 2)):
        weight = onnx.TensorProto(name="w", data_type=1, dims=[rows, 2**15], data_location=onnx.TensorProto.EXTERNAL)
        weight.external_data.add(key="location", value="nothing.bin")
        node = onnx.helper.make_node("MatMul", ["w", "x"], ["y"])
        graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
        (tmp_path / f"{name}.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    words = ["compress", "--budget", "50%", "--data", "random", "--table", ":memory:", "--out", str(tmp_path / "o")]
    found = options.settings(parser().parse_args([*words, str(tmp_path / "large.onnx")]))["deployment"]
    assert found.address == "" and "runs in this one, as with --in-process" in capsys.readouterr().err
    for other in ("small.onnx", "none.onnx"):  # one that is not there is refused by its reader
        found = options.settings(parser().parse_args([*words, str(tmp_path / other)]))["deployment"]
        assert found.address == "local" and not capsys.readouterr().err
