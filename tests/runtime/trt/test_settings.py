"""Settings of the builder, as users give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.commands.export import commands
from sluice.core.errors import SluiceError
from sluice.runtime.trt.settings import VARIABLE, Settings
from tests.commands.test_export import install
from tests.device import chain

ALL = "level=4, workspace=2048 streams=1,timings=3"


def test_the_environment_gives_them() -> None:
    assert Settings.from_environment({}) == Settings()
    assert Settings.from_environment({VARIABLE: " "}) == Settings()
    found = Settings.from_environment({VARIABLE: ALL})
    assert found == Settings(workspace_mib=2048, optimization_level=4, aux_streams=1, timings=3)
    assert str(found) != str(Settings()) and "level 4" in str(found)
    assert Settings.from_environment({VARIABLE: "level=0"}) == Settings(optimization_level=0)


@pytest.mark.parametrize("wrong", ["level", "level=", "level=high", "levels=3", "level=3,level=4", "level=-1", "=3"])
def test_anything_else_is_refused(wrong: str) -> None:
    with pytest.raises(SluiceError, match=f"{VARIABLE} holds .* give workspace, level, streams, timings, each"):
        Settings.from_environment({VARIABLE: wrong})


@pytest.mark.parametrize("wrong", ["level=6", "workspace=0", "timings=0"])
def test_values_are_checked(wrong: str) -> None:
    with pytest.raises(SluiceError, match="give"):
        Settings.from_environment({VARIABLE: wrong})


def test_engines_and_the_line_of_trtexec_follow_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sluice.commands.export_engine import Asked, write_engine

    trt = install(monkeypatch)
    monkeypatch.setenv(VARIABLE, ALL)
    write_engine(chain([5]), Asked(str(tmp_path / "a.engine")), 1)
    assert (trt.calls["builder_optimization_level"], trt.calls["workspace"]) == (4, 2048 << 20)
    assert (trt.calls["max_aux_streams"], trt.calls["avg_timing_iterations"]) == (1, 3)
    line = commands(chain([5]), "a.onnx", "a.engine", precision="fp32").trtexec
    for option in (
        "--maxAuxStreams=1",
        "--avgTiming=3",
        "--builderOptimizationLevel=4",
        "--memPoolSize=workspace:2048M",
    ):
        assert option in line.split()
    monkeypatch.delenv(VARIABLE)
    line = commands(chain([5]), "a.onnx", "a.engine", precision="fp32").trtexec
    assert "--maxAuxStreams=0" in line and "Level" not in line and "memPool" not in line
