"""Random networks are cut rightly (`tests.grammar`), and the harness counts a rewriter that cuts wrongly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sluice.core.plan import Plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.graph.operators import ATEN, ONNX
from tests.grammar import PLANS, run
from tests.grammar_networks import random_network
from tests.grammar_operators import NEVER, missing

NETWORKS = 40


def test_random_networks() -> None:
    figures, kinds, _ = run(NETWORKS)
    assert figures == {"networks": NETWORKS, "plans": NETWORKS * PLANS, "mismatches": 0}
    assert all(kinds[kind] >= 10 for kind in ("slices", "factorizations", "drops", "merges")), kinds


def test_operators_that_no_network_has_are_told() -> None:
    table = {f"aten.{name}" for name in ATEN} | {f"onnx.{name}" for name in ONNX}
    assert table >= NEVER.keys()
    assert missing(table) == [] and set(missing(())) == table - NEVER.keys()
    assert missing(table - {"aten.einsum"}) == ["aten.einsum"]


def test_the_same_seed_gives_the_same_network() -> None:
    (first, _, said), (second, _, again) = random_network(3), random_network(3)
    assert said == again
    assert all((value == second.state_dict()[name]).all() for name, value in first.state_dict().items())


def without_slices(plan: Plan) -> Plan:
    return replace(plan, slices=())


def test_a_wrong_rewriter_is_counted() -> None:
    def torch_fault(model: Any, plan: Plan, inputs: Any) -> Any:
        return rewrite_torch(model, without_slices(plan), inputs)

    def onnx_fault(model: Any, plan: Plan) -> Any:
        return rewrite_onnx(model, without_slices(plan))

    for rewrites in ((torch_fault, rewrite_onnx), (rewrite_torch, onnx_fault)):
        assert run(1, 0, rewrites, show=False)[0]["mismatches"] >= 1
