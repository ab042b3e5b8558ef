"""Gates that start at a configuration decide for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sluice.core.plan import Merge
from sluice.passes.gates.filter_gates import INITIAL_LOGIT, Gate, Gates
from sluice.passes.gates.merge_gates import exclude_each_other
from sluice.passes.gates.rank_gates import RankGate
from sluice.passes.gates.start import start_at


def rank_gate(name: str) -> RankGate:
    values = torch.tensor([3.0, 1.4, 0.9, 0.2, 0.05])
    left, right = (torch.linalg.qr(torch.randn(n, 5, generator=torch.Generator().manual_seed(n)))[0] for n in (9, 7))
    return RankGate(name, "kxk-1x1", left @ torch.diag(values) @ right.T)


MERGES = {"m1": Merge(("x", "y"), (("x", "y"),)), "m2": Merge(("y", "z"), (("y", "z"),))}


def some_gates() -> Gates:
    ranks = [rank_gate("w"), rank_gate("v")]
    return Gates({"a": 8, "b": 5}, 10, ranks, ["block", "other"], exclude_each_other(MERGES))


def test_decisions_are_those_of_the_configuration() -> None:
    gates, form = some_gates(), rank_gate("w").form
    before = float(gates[f"v|{form}|rank"].theta.detach())  # type: ignore[union-attr]
    configuration = {
        "a": 3, "b": 5, f"w|{form}": 1, f"w|{form}|rank": 2, f"v|{form}": 0, f"v|{form}|rank": 1, "block|drop": 1,
        "other|drop": 0, "m1": 0, "m2": 1,
    }  # fmt: skip
    scores = {"a": np.array([0.1, 5.0, 0.2, 4.0, 0.3, 0.4, 9.0, 0.5]), "b": np.ones(5)}
    start_at(gates, configuration, scores)
    decided = gates.widths()
    assert {s: decided[s] for s in configuration if s in decided and s != f"v|{form}|rank"} == {
        "a": 3, "b": 5, f"w|{form}|rank": 2, "block|drop": 1, "other|drop": 0, "m1": 0, "m2": 1,
    }  # fmt: skip
    assert float(gates[f"v|{form}|rank"].theta.detach()) == before  # type: ignore[union-attr]
    first = gates["a"]
    assert isinstance(first, Gate)
    assert np.flatnonzero(first.decision().numpy()).tolist() == [1, 3, 6]


def test_the_edge_is_nearest_to_the_decision() -> None:
    gates = Gates({"a": 12}, 10)
    start_at(gates, {"a": 5}, {"a": np.arange(12.0)[::-1].copy()})
    gate = gates["a"]
    assert isinstance(gate, Gate)
    logits = gate.logit.detach().numpy() / INITIAL_LOGIT
    assert logits == pytest.approx([(4.5 - r) / 6 for r in range(11)] + [-1])


def test_a_whole_group_starts_open_but_at_its_edge() -> None:
    gates = Gates({"a": 8}, 10)
    start_at(gates, {"a": 8}, {"a": np.arange(8.0)})
    assert gates.widths() == {"a": 8}
    gates = Gates({"a": 8}, 10)
    start_at(gates, {}, {})
    assert float(gates["a"].logit.detach().min()) == INITIAL_LOGIT  # type: ignore[union-attr]
