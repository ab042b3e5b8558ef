"""A walk gives the values that the whole network has, whatever it remembers on the way."""

from __future__ import annotations

import pytest
import torch

from sluice.passes.graph.capture import capture
from sluice.runtime.base.compare import assert_close
from sluice.training import graph_walk
from sluice.training.graph_walk import GraphWalk
from tests.networks import build


@pytest.mark.parametrize("limit", [2**30, 0])
@pytest.mark.parametrize("name", ["plain", "norms", "tied"])
def test_values_along_the_way(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_walk, "LIMIT", limit)
    model, inputs = build(name)
    captured = capture(model, inputs).eval()
    batches = [inputs, tuple(x + 1 if x.is_floating_point() else x for x in inputs)]
    walk = GraphWalk(captured, batches)
    full = []
    for batch in batches:
        interpreter = torch.fx.Interpreter(captured, garbage_collect_values=False)
        interpreter.run(*batch)
        full.append(interpreter.env)
    nodes = [node for node in captured.graph.nodes if node.op == "call_function" and node.users]
    wanted = nodes[:: max(1, len(nodes) // 5)]
    with torch.no_grad():
        for node in wanted:
            found = list(walk.values(node, moving=True))
            assert len(found) == 2
            for value, env in zip(found, full, strict=True):
                if isinstance(value, torch.Tensor):
                    assert_close(value, env[node].detach())
    assert (walk._at > 0) == (limit > 0)


def test_a_change_ahead_is_seen_and_one_behind_is_not() -> None:
    model, inputs = build("plain")
    captured = capture(model, inputs).eval()
    walk = GraphWalk(captured, [inputs])
    layers = [n for n in captured.graph.nodes if n.op == "call_function" and "conv" in str(n.target)]
    weights = [str(next(a.target for a in n.all_input_nodes if a.op == "get_attr")) for n in layers]
    state = captured.state_dict()
    with torch.no_grad():
        (first,) = walk.values(layers[0], moving=True)
        (before,) = walk.values(layers[1])
        state[weights[0]].zero_()  # passed
        (same,) = walk.values(layers[1])
        assert torch.equal(same, before)
        state[weights[1]].zero_()
        (other,) = walk.values(layers[1])
    assert first.abs().max() > 0 and not torch.equal(other, before)
