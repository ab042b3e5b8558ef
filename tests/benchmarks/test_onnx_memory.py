"""The committed rows of memory keep to the bound that the benchmark states, and a row beyond it is an error."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.onnx_memory import FILES_HERE, RESULT, Row, main


def test_all_rows_are_within_the_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show"]) == 0
    rows = [Row(**row) for row in json.loads(RESULT.read_text())["rows"]]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["within"] == len(FILES_HERE)
    assert {row.file for row in rows} == FILES_HERE.keys() and all(row.floor > 0 for row in rows)
    rows[0] = replace(rows[0], over=rows[0].bound + 1)
    beyond = tmp_path / "rows.json"
    beyond.write_text(json.dumps({"rows": [asdict(row) for row in rows]}))
    assert main(["--show", "--result", str(beyond)]) == 1
