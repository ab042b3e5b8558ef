"""Round trip, atomic save, and the figures a reader looks for."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sluice.artifacts.report import Report
from sluice.artifacts.report_rows import EditRow, GroupRow, MethodRow, PieceRow, edit_rows
from sluice.artifacts.report_text import FEW, first_line, report_text
from sluice.core.errors import SluiceError
from sluice.core.latency import Extent, LatencyModel, Rule, Term
from sluice.core.plan import Drop, Factorize, Merge, Plan
from sluice.solver.options import METHODS, EditSpace, RankOption

number = st.floats(allow_nan=False, allow_infinity=False)
count = st.integers(0, 10**12)
extents = st.lists(st.integers(1, 4096), max_size=3).map(tuple)
reports = st.builds(
    Report,
    budget_ms=number,
    dense_ms=number,
    promised_ms=number,
    measured_ms=st.none() | number,
    parity_max_rel=st.none() | number,
    params_dense=count,
    params_slim=count,
    macs_dense=count,
    macs_slim=count,
    metric_dense=st.none() | number,
    metric_slim=st.none() | number,
    seconds=number,
    rounds=count,
    fingerprint=st.dictionaries(st.text(), st.text() | st.integers() | number, max_size=3),
    pieces=st.lists(st.builds(PieceRow, st.text(), st.text(), count, number, number, extents, extents), max_size=3).map(
        tuple
    ),
    groups=st.lists(st.builds(GroupRow, st.text(), count, count), max_size=3).map(tuple),
    skipped=st.lists(st.tuples(st.text(), st.text()), max_size=3).map(tuple),
    error=st.dictionaries(st.text(), number, max_size=3),
    methods=st.lists(st.builds(MethodRow, st.text(), count, number, st.none() | number), max_size=3).map(tuple),
    edits=st.lists(st.builds(EditRow, st.text(), st.text(), st.text()), max_size=3).map(tuple),
    readings=st.lists(st.tuples(st.text(), number, st.lists(number, max_size=3).map(tuple)), max_size=3).map(tuple),
    runs=st.none() | count,
    dense_runs=st.none() | count,
    uncertainty=st.none() | number,
    quiet=st.booleans(),
    slower=number,
    plain_ms=st.none() | number,
    plain_uncertainty=st.none() | number,
    from_plain=st.booleans(),
)
OLD = """{"version": 1, "budget_ms": 2.5, "dense_ms": 5.0, "promised_ms": 2.4, "measured_ms": 2.45,
"parity_max_rel": 3e-07, "params_dense": 270, "params_slim": 117, "macs_dense": 3100, "macs_slim": 1090,
"metric_dense": 98.9, "metric_slim": null, "seconds": 151.5, "rounds": 3, "fingerprint": {"device": "cpu"},
"pieces": [{"name": "conv1", "description": "Conv", "count": 1, "ms_before": 0.5, "ms_after": 0.25,
"extents_before": [3, 16], "extents_after": [3, 7]}], "groups": [{"name": "conv1", "dense": 16, "kept": 7}],
"skipped": [["fc", "is an output"]], "error": {"n": 14.0}}"""


@pytest.fixture
def report() -> Report:
    return Report(
        budget_ms=2.5,
        dense_ms=4.96,
        promised_ms=2.437,
        measured_ms=2.461,
        parity_max_rel=3.2e-7,
        params_dense=11173962,
        params_slim=3391234,
        macs_dense=555422720,
        macs_slim=201334455,
        metric_dense=0.9512,
        metric_slim=0.9467,
        seconds=12.34,
        rounds=2,
        fingerprint={"device": "cpu"},
        pieces=(
            PieceRow("layer1.conv", "Conv 3x3", 1, 0.50, 0.41, (64, 64), (64, 48)),
            PieceRow("[layer4.conv]", "Conv 3x3", 3, 0.90, 0.30, (512, 511), (512, 160)),
        ),
        groups=(GroupRow("layer1", 64, 48), GroupRow("stem", 64, 64)),
        skipped=(("fc", "the model's output is never cut"),),
        error={"median_abs_err": 0.011, "p95_abs_err": 0.052, "spearman": 0.9, "n": 9.0},
        methods=(MethodRow("filter", 3, 1.234, 0.0625), MethodRow("block", 1, 0.777)),
        edits=(EditRow("block", "layer2.0", "dropped, 6 tensors"),),
        readings=(("[together]", 2.437, (0.5, 0.25)), ("filter alone", 2.431, ())),
        runs=1,
        dense_runs=3,
        uncertainty=0.0114,
    )


def text_of(report: Report, full: bool = False) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(report_text(report, full))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@given(reports)
def test_json_round_trip(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


def test_save_and_load(tmp_path: Path, report: Report) -> None:
    path = tmp_path / "report.json"
    report.save(path)
    report.save(path)
    assert Report.from_json(path.read_text()) == report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_failed_save_leaves_the_old_file(tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    report.save(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(report, seconds=math.nan).save(path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(SluiceError, match="disk full"):
            replace(report, rounds=7).save(path)
    assert Report.from_json(path.read_text()) == report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_first_line_says_what_was_reached(report: Report) -> None:
    made_for = {"device": "Some CPU", "runtime": "ort-cpu", "threads": 2, "precision": "fp16", "batch": 8}
    whole = replace(report, fingerprint=made_for, metric_deployed=0.9461)
    want = "4.96 -> 2.461 ms (49.6% of dense, budget 50.4% met, promised 2.437), accuracy 0.9512 -> 0.9467 (-0.0045), "
    assert first_line(whole) == f"{want}in fp16 0.9461 (-0.0051), batch 8, ort-cpu, 2 threads, fp16, Some CPU"
    assert first_line(whole) in text_of(whole).replace("\n", " ").replace("  ", " ")
    missed = replace(whole, measured_ms=2.6)
    assert not missed.met() and "(52.4% of dense, budget 50.4% MISSED, promised 2.437)" in first_line(missed)
    bare = replace(report, measured_ms=None, parity_max_rel=None, metric_dense=None, metric_slim=None, pieces=())
    assert bare.met() and "budget 50.4% met, as promised, not measured), fp32, cpu" in first_line(bare)
    assert "accuracy" not in text_of(bare) and "differ by" not in text_of(bare)


def test_what_follows_has_the_figures_in_order(report: Report) -> None:
    text = text_of(report)
    assert "parameters 11,173,962 -> 3,391,234 (30.3%)\n" in text
    assert "multiply-accumulates 555,422,720 -> 201,334,455 (36.2%)\n" in text
    assert "engine measured once, the dense one 3 times in 2 rounds, within 1.1%\n" in text
    assert "differ by 3.2e-07 of the output\n" in text
    assert "promises against engines of this network: median error 1.1%, 95th percentile 5.2%, on 9 engines\n" in text
    assert "1 of 2 groups cut, 112 of 128 channels kept" in text
    words = [line.split() for line in text.splitlines()]
    assert ["filter", "3", "1.234", "0.0625"] in words
    assert ["block", "1", "0.777", "-"] in words
    assert ["[together]", "2.437", "0.5", "0.25"] in words
    assert ["filter", "alone", "2.431", "-"] in words
    assert "  block layer2.0: dropped, 6 tensors\n" in text
    marks = ["ms saved by it", "parameters", "channels kept", "rehearsed", "[layer4.conv]", "layer1.conv"]
    marks += ["restructured", "fc: the model's output is never cut"]
    assert [text.index(m) for m in marks] == sorted(text.index(m) for m in marks)


def layers_of(report: Report) -> list[list[str]]:
    lines = text_of(report).splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("layer "))
    return [line.split("  ") for line in lines[start + 1 : lines.index("", start)]]


def test_a_layer_saves_what_is_left_after_what_took_its_place(report: Report) -> None:
    replaced = PieceRow("a", "Conv 3x3", 1, 0.8, 0.0, (16, 16), (16, 16), "a")
    factors = [PieceRow(f"a|{k}", "in place of a", 1, 0.0, ms, (), (), "a") for k, ms in enumerate((0.1, 0.2))]
    joint = PieceRow("joint", "joint", 1, -0.05, -0.52, (), ())
    others = [PieceRow(f"p{k}", "Conv 1x1", 1, 0.01 * (k + 2), 0.01, (8,), (4,)) for k in range(12)]
    made = replace(report, pieces=(*others, joint, *factors, replaced))
    rows = layers_of(made)
    assert [cell.strip() for cell in rows[0] if cell] == ["a", "Conv 3x3, replaced", "0.800", "0.300", "0.500"]
    assert [cell.strip() for cell in rows[1] if cell] == ["p11", "Conv 1x1, 8 -> 4", "0.130", "0.010", "0.120"]
    assert len(rows) == FEW + 1 and rows[-1][0] == "everything else" and "joint" not in [row[0] for row in rows]
    # Three pieces of 0.01, 0.02 and 0.03 are left, and the joint.
    assert float(rows[-1][-1]) == pytest.approx(sum(p.saved_ms() for p in made.pieces) - 0.5 - sum(
        0.01 * (k + 1) for k in range(3, 12)), abs=6e-4)  # fmt: skip
    full = text_of(made, full=True)
    for row in made.pieces:
        assert f"\n{row.name} " in full
    assert "8 -> 4" in full and "everything else" not in full


def test_long_lists_are_shortened_unless_all_is_asked_for(report: Report) -> None:
    many = replace(report, skipped=tuple((f"layer{k}", "its reason") for k in range(FEW + 3)))
    assert "layer8: its reason" in text_of(many) and "layer9: its reason" not in text_of(many)
    assert "  and 4 more; `sluice report DIR --full` has them all\n" in text_of(many)
    assert f"layer{FEW + 2}: its reason" in text_of(many, full=True) and "more;" not in text_of(many, full=True)
    just = replace(many, skipped=many.skipped[:FEW])
    assert f"layer{FEW - 1}: its reason" in text_of(just) and "more;" not in text_of(just)


def test_a_network_that_fits_as_it_is_says_so(report: Report) -> None:
    whole = tuple(replace(group, kept=group.dense) for group in report.groups)
    text = text_of(replace(report, groups=whole, edits=()))
    assert "the dense network already fits; nothing was cut\n" in text and "ms saved by it" not in text
    for cut in (replace(report, groups=whole), replace(report, edits=())):
        assert "already fits" not in text_of(cut)


def test_figures_of_a_machine_that_was_never_quiet_say_so(report: Report) -> None:
    busy = replace(report, runs=3, dense_runs=1, rounds=1, uncertainty=0.2, quiet=False)
    text = text_of(busy)
    assert busy.met() and "\nmeasured on a machine that was never quiet: do not rely on these times" in text
    assert "engine measured 3 times, the dense one once in 1 round, within 20.0%\n" in text
    assert json.loads(busy.to_json())["quiet"] is False and "quiet" not in text_of(report)
    near = replace(report, slower=0.032)
    assert "\nmeasured on a machine that took 3.2% more than when it is quiet\n" in text_of(near)
    assert "never quiet" not in text_of(near) and "3.2%" not in text_of(replace(near, quiet=False))


def test_a_promise_above_the_budget_is_told_where_the_measurement_is_below(report: Report) -> None:
    want = "the measurement is within the budget of 2.5 ms, the promise is above it\n"
    assert want not in text_of(report)
    above = replace(report, promised_ms=2.6)
    assert above.met() and want in text_of(above)
    assert want not in text_of(replace(above, measured_ms=2.55)) and not replace(above, measured_ms=2.55).met()
    assert want not in text_of(replace(above, measured_ms=None))


def test_plain_export_is_told(report: Report) -> None:
    assert "plain export" not in text_of(report)
    plain = replace(report, plain_ms=4.96)
    assert "plain export takes 100.0% of the dense time; slim takes 49.6% of it\n" in text_of(plain)
    faster = replace(report, plain_ms=4.712, plain_uncertainty=0.0174, from_plain=True)
    want = "plain export takes 95.0% of the dense time, within 1.7%, and budgets in percent count from it"
    assert f"{want}; slim takes 52.2% of it\n" in text_of(faster)


def test_other_files_are_refused(report: Report) -> None:
    data = json.loads(report.to_json())
    with pytest.raises(SluiceError, match="no report"):
        Report.from_json("{")
    with pytest.raises(SluiceError, match="its version is 9"):
        Report.from_json(json.dumps({**data, "version": 9}))
    with pytest.raises(SluiceError, match=r"lacks or adds \['rounds'\]"):
        Report.from_json(json.dumps({k: v for k, v in data.items() if k != "rounds"}))


def test_reports_of_version_1_load() -> None:
    report = Report.from_json(OLD)
    assert report.pieces == (PieceRow("conv1", "Conv", 1, 0.5, 0.25, (3, 16), (3, 7)),)
    assert report.groups == (GroupRow("conv1", 16, 7),)
    assert report.skipped == (("fc", "is an output"),)
    assert (report.methods, report.edits, report.readings) == ((), (), ())
    assert (report.runs, report.dense_runs, report.uncertainty, report.quiet) == (None, None, None, True)
    assert "ms saved by it" not in text_of(report) and "engine measured" not in text_of(report)
    assert Report.from_json(report.to_json()) == report
    with pytest.raises(SluiceError, match=r"lacks or adds \['rounds'\]"):
        Report.from_json(OLD.replace('"rounds": 3, ', ""))


def test_reports_of_version_3_load(report: Report) -> None:
    data = json.loads(report.to_json())
    for name in ("runs", "dense_runs", "uncertainty", "quiet", "slower", "plain_ms", "plain_uncertainty", "from_plain"):
        del data[name]
    loaded = Report.from_json(json.dumps({**data, "version": 3}))
    assert loaded == replace(report, runs=None, dense_runs=None, uncertainty=None, quiet=True)
    with pytest.raises(SluiceError, match=r"lacks or adds \['dense_runs', 'from_plain', 'plain_ms'"):
        Report.from_json(json.dumps(data))


def test_edits_of_a_plan() -> None:
    shapes = {name: (4, 4, 3, 3) for name in "abcdef"}
    merge = Merge(("c", "d", "e"), (("c",), ("e",)))
    plan = Plan(
        shapes, factorizations=(Factorize("a", "kx1-1xk", 2),), drops=(Drop("two", ("b", "f")),), merges=(merge,)
    )
    assert edit_rows(plan) == (
        EditRow("rank", "a", "kx1-1xk, rank 2"),
        EditRow("block", "two", "dropped, 2 tensors"),
        EditRow("merge", "c..e", "3 layers, of c | e"),
    )


def structured() -> tuple[LatencyModel, EditSpace]:
    """Layers a to d, each on the widths g and h: a may have a rank, (a, b) may go, (c, d) or (b, c) may be merged.

    Dense, a layer takes ``g * h / 10`` ms; a of rank r ``r / 10`` ms, a merged run ``g / 10`` ms.
    """
    option = RankOption("a", "kxk-1x1")
    options = EditSpace(
        (option,),
        {"block|drop": Drop("block", ("a", "b"))},
        {"c..d|merge": Merge(("c", "d"), (("d",),)), "b..c|merge": Merge(("b", "c"), (("c",),))},
    )
    others = {"a": [option.switch, "block|drop"], "b": ["block|drop", "b..c|merge"]}
    others |= {"c": ["c..d|merge", "b..c|merge"], "d": ["c..d|merge"]}
    rules = tuple(Rule(tuple((name, 1) for name in (f"{layer}|dense", *rest))) for layer, rest in others.items())
    switches = {name: int(name.endswith("dense")) for rule in rules for name, _ in rule.coefs}
    sizes = {"g": 10, "h": 10, option.rank: 8}
    grid = np.arange(11.0)

    def term(name: str, *sites: str, when: str) -> Term:
        axes = np.meshgrid(*[grid] * len(sites), indexing="ij")
        ms = np.prod(np.stack(axes), axis=0) / 10
        return Term(name, tuple(Extent(((s, 1),)) for s in sites), (grid,) * len(sites), ms, 1.0, (when,))

    terms = [term(layer, "g", "h", when=f"{layer}|dense") for layer in others]
    terms += [term(option.switch, option.rank, when=option.switch)]
    terms += [term(switch, "g", when=switch) for switch in options.merges]
    levels = {s: (0, 1) for s in switches} | {"g": (5, 10), "h": (7, 10), option.rank: (2, 8)}
    return LatencyModel(tuple(terms), {**sizes, **switches}, levels, 0.5, 2.0, {}, rules, frozenset(switches)), options


def test_contributions() -> None:
    from sluice.pipeline.report_figures import contributions

    model, options = structured()
    (option,) = options.ranks
    chosen = {**model.dense, "g": 5, option.rank: 2, option.switch: 1, "a|dense": 0}
    chosen |= {"c|dense": 0, "d|dense": 0, "c..d|merge": 1}
    assert model.ms(chosen) == pytest.approx(0.5 + 2 * (0.2 + 5 + 0.5))
    losses = {"g": np.array([0.5, 0.0]), option.switch: np.array([0.0, 0.25]), option.rank: np.array([0.125, 0.0])}
    losses |= {"block|drop": np.array([0.0, 9.0]), "c..d|merge": np.array([0.0, 4.0])}
    rows = {row.name: row for row in contributions(model, options, chosen, losses)}
    assert tuple(rows) == METHODS
    assert [rows[name].sites for name in METHODS] == [1, 1, 0, 1]
    assert [rows[name].loss for name in METHODS] == [0.5, 0.375, 0.0, 4.0]
    # Without filters b takes 10 and the run 1; without the rank a takes 5; without the merge c and d take 5 each.
    want = [2 * (5 + 0.5), 2 * (5 - 0.2), 0.0, 2 * (10 - 0.5)]
    assert [rows[name].saved_ms for name in METHODS] == pytest.approx(want)

    assert [row.loss for row in contributions(model, options, chosen)] == [None] * 4
    part = {name: losses[name] for name in ("g", "c..d|merge")}  # a rank without a price
    assert [row.loss for row in contributions(model, options, chosen, part)] == [0.5, None, 0.0, 4.0]

    dropped = {**model.dense, "block|drop": 1, "a|dense": 0, "b|dense": 0}
    assert [row.name for row in contributions(model, options, dropped, methods=("rank", "block"))] == ["rank", "block"]
    rows = {row.name: row for row in contributions(model, options, dropped)}
    assert rows["block"] == MethodRow("block", 1, pytest.approx(2 * 20))  # type: ignore[arg-type]
    assert [(row.sites, row.saved_ms) for row in rows.values() if row.name != "block"] == [(0, 0.0)] * 3


def test_the_rows_of_pieces_say_whose_place_they_take() -> None:
    from sluice.pipeline.report_figures import piece_rows

    model, options = structured()
    (option,) = options.ranks
    chosen = {**model.dense, "g": 5, option.rank: 2, option.switch: 1, "a|dense": 0}
    chosen |= {"c|dense": 0, "d|dense": 0, "c..d|merge": 1}
    rows = {r.name: r for r in piece_rows(model, chosen, {"b": "Conv 8x2*e0+3 -> 8x1*e0+1*e1+0, Add 8x4"})}
    assert {name: row.layer for name, row in rows.items()} == {
        "a": "a", option.switch: "a", "b": "", "c": "c to d", "d": "c to d", "c..d|merge": "c to d",
    }  # fmt: skip
    assert rows["b"].description == "Conv 8x23 -> 8x20, Add 8x4"
    assert rows["c..d|merge"].description == "in place of c to d" and rows["c..d|merge"].ms_before == 0.0
    assert rows["b"].ms_before == pytest.approx(10.0) and rows["b"].ms_after == pytest.approx(5.0)
    assert rows["b"].extents_before == (10, 10) and rows["b"].extents_after == (5, 10)


def test_torch_is_not_imported() -> None:
    code = "import sys, sluice.artifacts.report; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
