"""Kernels that a runtime tells shape the pieces of a profile, and are kept in its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.profiler.profile import profile_known, profile_onnx
from sluice.profiler.summary import profile_summary
from sluice.profiler.sweep.fusion import NAME
from sluice.profiler.table.latency_table import LatencyTable
from sluice.runtime.base.inputs import parsed
from tests.device import FakeRunner, chain, profile_on

DEPLOYMENT = Deployment("ort-cpu", 2)


class Telling(FakeRunner):
    """Computes the first two convolutions by one kernel, and every other operator by its own."""

    def __init__(self, broken_after: int | None = None) -> None:
        super().__init__()
        self.asked, self.broken_after = 0, broken_after

    def fused(self, model: Any, *, batch: int | None = None) -> list[list[str]]:
        if self.asked == self.broken_after:
            raise SluiceError("this engine does not build")
        self.asked += 1
        names = [node.name or f"node_of_{node.output[0]}" for node in parsed(model).graph.node]
        first = [n for n, node in zip(names, parsed(model).graph.node, strict=True) if node.op_type == "Conv"][:2]
        return [first, *([name] for name in names if name not in first)]


@pytest.mark.parametrize("apart", [False, True])
def test_kernels_that_no_piece_has_alone_are_told(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    profile_on(lambda target, threads=1: Telling(), monkeypatch)
    if apart:
        monkeypatch.setattr("sluice.profiler.sweep.fusion.states_of", lambda parts, space, methods: [None] * len(parts))
    measured = profile_onnx(chain([6, 7, 8]), deployment=DEPLOYMENT, progress=False)
    data, lines = profile_summary(measured, ("filter",))
    assert len(data["kernels_in_several"]) == apart == any("compute operators of several pieces" in x for x in lines)


def test_a_profile_has_the_pieces_of_its_kernels_and_so_has_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, table, runner = chain([6, 7, 8]), tmp_path / "t.db", Telling()
    profile_on(lambda target, threads=1: FakeRunner(), monkeypatch)
    plain = profile_onnx(model, deployment=DEPLOYMENT, progress=False)
    profile_on(lambda target, threads=1: runner, monkeypatch)
    profile = profile_onnx(model, table, deployment=DEPLOYMENT, progress=False)
    assert len(profile.partition.pieces) == len(plain.partition.pieces) - 1 and profile.partition.by_kernels
    assert runner.asked == 3  # the dense engine and two random ones
    assert profile.latency.ms(profile.layout.dense) == pytest.approx(plain.latency.ms(plain.layout.dense), rel=1e-6)
    profile.bench.table.close()

    again = profile_onnx(model, table, deployment=DEPLOYMENT, progress=False)
    assert runner.asked == 3 and again.model_key == profile.model_key
    again.bench.table.close()
    known = profile_known(model, table)  # where nothing can be built
    assert known.model_key == profile.model_key
    names = [name for name in known.bench.table.blobs() if name.startswith(NAME)]
    assert len(names) == 1 and json.loads(known.bench.table.get_blob(names[0]) or b"")
    known.bench.table.close()


def test_random_engines_that_do_not_build_are_left_out_and_the_dense_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile_on(lambda target, threads=1: Telling(broken_after=1), monkeypatch)
    assert profile_onnx(chain([6, 7, 8]), deployment=DEPLOYMENT, progress=False).partition.by_kernels
    profile_on(lambda target, threads=1: Telling(broken_after=0), monkeypatch)
    with pytest.raises(SluiceError, match="does not build"):
        profile_onnx(chain([6, 7, 8]), deployment=DEPLOYMENT, progress=False)


def test_a_table_of_before_keeps_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed table without kernels is read with the pieces that it was filled with."""
    model, table = chain([6, 7, 8]), tmp_path / "t.db"
    profile_on(lambda target, threads=1: FakeRunner(), monkeypatch)
    before = profile_onnx(model, table, deployment=DEPLOYMENT, progress=False)
    before.bench.table.close()
    known = profile_known(model, table)
    assert known.model_key == before.model_key and not known.partition.by_kernels
    assert not any(name.startswith(NAME) for name in LatencyTable.open(table).blobs())
