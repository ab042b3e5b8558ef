"""The committed rows of memory keep to the bound that the benchmark states, and a row beyond it is an error."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import onnx_memory_chains as chains
from benchmarks.onnx_memory import FILES_HERE, RESULT, Row, main
from sluice.passes.files.read import read_onnx_file
from sluice.passes.graph.onnx_axes import analyze_onnx


def test_all_rows_are_within_the_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show"]) == 0
    rows = [Row(**row) for row in json.loads(RESULT.read_text())["rows"]]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["within"] == len(FILES_HERE)
    assert {row.file for row in rows} == FILES_HERE.keys() and all(row.floor > 0 for row in rows)
    rows[0] = replace(rows[0], over=rows[0].bound + 1)
    beyond = tmp_path / "rows.json"
    beyond.write_text(json.dumps({"rows": [asdict(row) for row in rows]}))
    assert main(["--show", "--result", str(beyond)]) == 1


@pytest.mark.parametrize("name", chains.CHAINS)
def test_chains_run_and_can_be_cut_everywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, small in (("SIZE", 8), ("PRODUCTS", 4), ("WIDE", 8), ("LAYERS", 4)):
        monkeypatch.setattr(chains, setting, small)
    monkeypatch.setattr(chains.CHAINS[name], "shape", (8,))
    path = chains.made(name, tmp_path)
    written = path.stat().st_mtime_ns
    assert chains.size_of(path) > 4 * 8 * 8 * 4 and (chains.size_of(path) == path.stat().st_size) == (
        not chains.CHAINS[name].apart
    )
    file = read_onnx_file(path)
    assert file.batch_is_open and len(analyze_onnx(file.model).groups) == 3
    assert chains.made(name, tmp_path) == path and path.stat().st_mtime_ns == written
