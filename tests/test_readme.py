"""What the README shows runs: its Python on a small network and a simulated device, its commands through the parser."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

import sluice
from sluice.artifacts.report import Report
from sluice.cli import main, parser
from sluice.core.deployment import TARGETS, UNFIT
from sluice.profiler import agent
from sluice.profiler.sweep.shards import Shard
from sluice.profiler.table.latency_table import LatencyTable
from sluice.solver.options import METHODS
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
VERBS = [
    "apply",
    "bench",
    "check",
    "compress",
    "export",
    "inspect",
    "models",
    "plan",
    "profile",
    "report",
    "serve",
    "table",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines(program: str) -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith(program)]


def commands() -> list[str]:
    """Lines of the shell blocks and of the table; what is optional is given."""
    lines = shell_lines("sluice")
    lines += re.findall(r"^\| `(sluice [^`]+)` \|", README, re.MULTILINE)
    return [re.sub(r"[\[\]]", "", line) for line in lines if line]


def accuracy(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return float(torch.cat([model(x).argmax(1) == y for x, y in tiny.data()]).float().mean())


@pytest.mark.parametrize("chosen", [(0, 3), (1,), (2,)], ids=["own loop", "compress", "int8"])
def test_python_blocks(chosen: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"sluice": sluice, "model": tiny.model(), "x": tiny.inputs(8), "batches": tiny.data(), "accuracy": accuracy}
    code = blocks("python")
    assert len(code) == 4
    # The fewest epochs that say the same; the simulated device is no faster at training.
    text = "\n".join(code[i] for i in chosen).replace("epochs=10", "epochs=1")
    text = text.replace("out=", "gate_epochs=1, epochs=1, progress=False, out=")
    with tiny.simulated_device():
        exec(compile(text, "README.md", "exec"), names)
    report = names["done"].report  # type: ignore[attr-defined]
    assert isinstance(report, Report)
    assert report.met()
    assert report.measured_ms is not None
    assert report.measured_ms <= 0.5 * report.dense_ms
    assert {row.name for row in report.methods if row.sites} <= ({"filter"} if 0 in chosen else set(METHODS))
    assert any(row.sites for row in report.methods)
    files = {"manifest.json", "plan.json", "report.json", "slim.onnx", "slim.safetensors"}
    small = chosen == (2,)
    found = {path.name for path in (tmp_path / ("small" if small else "slim")).iterdir()}
    assert found == (files | {"slim.int8.onnx"} if small else files)
    assert (tmp_path / ("int8.db" if small else "table.db")).exists()
    assert (tmp_path / "again.onnx").exists() == (3 in chosen)


def test_all_verbs_are_shown() -> None:
    assert sorted({line.split()[1] for line in commands()}) == VERBS


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, verb, *rest = shlex.split(line)
    assert program == "sluice"
    assert callable(parser().parse_args([verb, *rest]).run)
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"usage: sluice {verb}" in capsys.readouterr().out


def section(title: str) -> str:
    return re.split(r"^#+ ", README.split(f"# {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def test_what_runs_on_the_device_parses() -> None:
    lines = [line for line in shell_lines("python") if not line.startswith("python -m zipfile ")]
    assert len(lines) == 4
    for line in lines:
        program, job, *rest = shlex.split(line)
        assert (program, job) == ("python", "job.zip")
        found = agent._parser().parse_args([job, *rest])
        assert found.out.endswith(".db")
        assert found.shard is None or isinstance(found.shard, Shard)


def test_the_commands_for_a_device_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other in one folder, on another network, by filters alone; the shards add up to the whole."""
    monkeypatch.chdir(tmp_path)
    ran = []
    lines = re.findall(r"^(?:sluice|python) .*", section("The device has no torch"), re.MULTILINE)
    with tiny.simulated_device():
        for line in lines:
            program, *rest = shlex.split(line.replace("sluice:resnet20", "tests.tiny:model --shape 3,9,9"))
            if rest[0] == "profile":
                rest += ["--methods", "filter", "--quiet"]
            assert {"sluice": main, "python": agent.main}[program](rest) == 0, capsys.readouterr().err
            ran.append(rest[0])
    assert ran.count("job.zip") == 4 and {"profile", "export", "table"} < set(ran)
    with LatencyTable.open("table.db") as whole, LatencyTable.open("all.db") as merged:
        assert (keys := whole.keys()) == merged.keys()
        assert all(whole.points(key).keys() <= merged.points(key).keys() for key in keys)


def test_the_device_needs_the_python_of_the_package() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"The device needs Python {wanted.removeprefix('>=')} or later" in README


def test_what_a_target_refuses_is_told() -> None:
    rows = re.findall(r"^\| `(\w[\w-]+)` \|[^|]*\| ([^|]+) \|", section("What is measured where"), re.MULTILINE)
    told = {(target, p) for target, text in rows for p in text.split(", ") if p != "nothing"}
    assert [target for target, _ in rows] == list(TARGETS)
    assert told == set(UNFIT)


def test_options_in_the_text_exist() -> None:
    from sluice.commands.specs import inputs_of

    helps = ""
    for verb in VERBS:
        action = next(iter(parser()._subparsers._group_actions))  # type: ignore[union-attr]
        helps += action.choices[verb].format_help()  # type: ignore[index,call-overload]
    assert set(re.findall(r"`(--\w+)", README)) <= set(re.findall(r"--\w+", helps))
    assert inputs_of("sluice:resnet20", None, 1).ndim == 4


def test_methods_are_told() -> None:
    told = README.split("| method | what goes | how |")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^\| (\w+) \|", told, re.MULTILINE)) == METHODS
    assert f"some of `{','.join(METHODS)}`" in README


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)`|^make (\w+)", README, re.MULTILINE))
    assert {a or b for a, b in re.findall(r"`make (\w+)`|^make (\w+)", README, re.MULTILINE)} <= targets


def test_links_lead_somewhere() -> None:
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/design.md", "CHANGELOG.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())]
    assert links
    assert not [(p.name, link) for p, link in links if "://" not in link and not (p.parent / link).exists()]


def test_modules_in_the_layout_exist() -> None:
    """Every module stands in the layout block of the design page, in the line of its folder; and no other does."""
    layout = (ROOT / "docs/design.md").read_text().split("## Layout")[1].split("```")[1]
    package = Path(next(iter(sluice.__path__)))
    told: dict[str, list[str]] = {}
    room = ""
    for line in layout.splitlines():
        if found := re.match(r" *([a-z_0-9]+)/", line):
            room, line = found[1], line[found.end() :]
        told.setdefault(room, []).extend(re.findall(r"[a-z_0-9]+\*?", re.sub(r"\([^)]*\)", "", line)))
    modules = {(path.parent.name, path.stem) for path in package.rglob("*.py") if path.stem[:2] != "__"}
    for room, module in sorted(modules):
        if room not in ("models", "sluice"):
            assert any(fnmatch.fnmatchcase(module, name) for name in told[room]), (
                f"docs/design.md lacks {room}/{module}"
            )
    for room in sorted(told.keys() - {"models", "sluice", ""}):
        for name in told[room]:
            assert any(fnmatch.fnmatchcase(m, name) for r, m in modules if r == room), f"there is no {room}/{name}"
