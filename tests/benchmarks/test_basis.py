"""Heads are told from their dimensions; the committed networks computed the same before the cut."""

from __future__ import annotations

import json

import pytest

from benchmarks.basis import BUDGETS, CUTS, RESULT, best, of_attention
from sluice.passes.graph.capture import capture
from tests.sequences import sequence


def test_heads_and_dimensions_are_told_apart() -> None:
    model, inputs = sequence("sdpa")
    analysis, kinds = of_attention(capture(model, inputs))
    sizes = {group.name: group.size for group in analysis.groups}
    assert [sizes[name] for name in kinds["heads"]] == [3]
    assert [sizes[name] for name in kinds["dims"]] == [4, 4]  # of q with k, and of v


def test_the_better_rate_counts() -> None:
    assert best({"tuned": {"1": [1.0, 3.0], "2": [4.0, 1.0]}}) == ", tuned 2.50"
    assert best({"tuned": {}}) == ""


def test_the_committed_figures() -> None:
    for rows in json.loads(RESULT.read_text()).values():
        assert rows["dense"]["rotated"] == pytest.approx(rows["dense"]["as it is"], abs=0.1)
        for cut in rows.keys() & CUTS.keys():
            assert rows[cut]["rotated"]["changed"] and not rows[cut]["as it is"]["changed"]
        for budget in rows.keys() & set(BUDGETS):
            assert all(row["share"] <= float(budget.rstrip("%")) / 100 for row in rows[budget].values())
