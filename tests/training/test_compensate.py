"""What compensation can mend it mends: removed channels that others stand for, ranks that the inputs do not need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from sluice.core.plan import Drop, Edits, Factorize, Plan
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_captured
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.training.compensate import compensate
from tests.networks import build, random_kept


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cut(dense: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    slim = clone(dense)
    rewrite_captured(slim, plan, merged=False)
    return slim.eval()


def doubled(*layers: nn.Module) -> nn.Sequential:
    """The layers, where channel 2k + 1 of all but the last is a multiple of channel 2k."""
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer in list(net)[:-1]:
            for tensor in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
                if tensor is not None:
                    tensor[1::2] = 1.5 * tensor[0::2]
    return net


NETWORKS = {
    "1-D": (lambda: doubled(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 5, 4, stride=2)), (3, 17)),
    "2-D": (
        lambda: doubled(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 6, (1, 3), padding="same", dilation=2)),
        (3, 9, 8),
    ),
    "3-D": (lambda: doubled(nn.Conv3d(2, 6, 2), nn.ReLU(), nn.Conv3d(6, 5, (1, 2, 2))), (2, 4, 5, 4)),
    "linear": (lambda: doubled(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 5)), (7,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_that_others_stand_for_are_not_missed(name: str) -> None:
    torch.manual_seed(2)
    make, shape = NETWORKS[name]
    dense = capture(make(), (seeded(4, *shape, seed=0),)).eval()
    (group,) = analyze(dense).groups
    plan = make_plan(analyze(dense), {group.name: range(0, group.size, 2)})
    slim = cut(dense, plan)
    held = seeded(32, *shape, seed=9)
    assert relative_error(slim(held), dense(held)) > 0.05
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    refitted = compensate(slim, dense, plan, [(seeded(64, *shape, seed=k), None) for k in range(3)])
    assert refitted == 2
    assert_close(slim(held).detach(), dense(held).detach(), 0.01)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("form", ["kxk-1x1", "1x1-kxk", "kx1-1xk"])
def test_a_rank_is_enough_where_the_inputs_have_no_more(form: str) -> None:
    """The inputs of the layer lie in few dimensions, its weight does not."""
    torch.manual_seed(3)
    narrow, wide = nn.Conv2d(3, 9, 1, bias=False), nn.Conv2d(9, 8, 3, padding=1)
    with torch.no_grad():
        narrow.weight[:, 2:] = 0.0
    dense = capture(nn.Sequential(narrow, wide, nn.ReLU(), nn.Conv2d(8, 4, 1)), (seeded(4, 3, 7, 6, seed=0),)).eval()
    rank = {"kxk-1x1": 8, "1x1-kxk": 2, "kx1-1xk": 6}[form]
    plan = make_plan(analyze(dense), {}, (), Edits((Factorize("1.weight", form, rank),)))
    slim, held = cut(dense, plan), seeded(16, 3, 7, 6, seed=9)
    plain = relative_error(slim(held), dense(held))
    assert compensate(slim, dense, plan, [seeded(64, 3, 7, 6, seed=k) for k in range(3)]) == 4
    assert_close(slim(held).detach(), dense(held).detach(), 0.01 if form != "kxk-1x1" else 0.02)
    assert form == "kxk-1x1" or plain > 0.05


def test_statistics_of_batch_norm_follow_the_slim_network() -> None:
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
        nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6, momentum=None), nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    ).train()  # fmt: skip
    data = [seeded(64, 3, 7, 6, seed=k) for k in range(4)]
    for x in data * 5:
        net(x)
    dense = capture(net.eval(), (data[0],)).eval()
    analysis = analyze(dense)
    plan = make_plan(analysis, {group.name: range(0, group.size, 2) for group in analysis.groups})
    slim = cut(dense, plan)
    compensate(slim, dense, plan, data)

    def into(gm: fx.GraphModule, place: str, x: Tensor) -> Tensor:
        walk = torch.fx.Interpreter(gm, garbage_collect_values=False)
        walk.run(x)
        node = next(n for n in gm.graph.nodes if n.op == "call_module" and n.target == place)
        return walk.env[node.args[0]]

    x = torch.cat(data)
    for place in ("1", "4"):
        norm, value = slim.get_submodule(place), into(slim, place, x).detach().transpose(0, 1).flatten(1)
        assert_close(norm.running_mean, value.mean(1), 0.05)
        assert_close(norm.running_var, value.var(1), 0.05)


@pytest.mark.parametrize("name", ["plain", "norms"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_that_was_cut_comes_nearer(name: str, seed: int) -> None:
    """Of inputs that were not used; of what the network has, every layer that may be refitted is."""
    model, inputs = build(name, batch=48)
    dense = capture(model, inputs).eval()
    plan = make_plan(analyze(dense), random_kept(analyze(dense), seed))
    slim = cut(dense, plan)
    held = build(name, batch=16)[1]
    plain = relative_error(slim(*held), dense(*held))
    assert compensate(slim, dense, plan, [(inputs, None)]) > 1
    assert relative_error(slim(*held), dense(*held)) < plain


def test_nothing_is_changed_where_nothing_was_cut() -> None:
    model, inputs = build("norms", batch=32)
    dense = capture(model, inputs).eval()
    plan = make_plan(analyze(dense), {})
    slim = cut(dense, plan)
    compensate(slim, dense, plan, [(inputs, None)])
    for key, value in dense.state_dict().items():
        assert_close(slim.state_dict()[key].float() + 1.0, value.float() + 1.0, 1e-3)


def test_a_shared_weight_stays_and_a_dropped_branch_is_no_obstacle() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 6, 3, padding=1)
            self.branch, self.head = nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            x = torch.relu(self.twice(torch.relu(self.twice(x))))
            return self.head(x + self.branch(x))

    torch.manual_seed(5)
    x = seeded(64, 3, 11, seed=0)
    dense = capture(Shared(), (x,)).eval()
    plan = make_plan(analyze(dense), {}, (), Edits(drops=(Drop("branch", ("branch.bias", "branch.weight")),)))
    slim, held = cut(dense, plan), seeded(32, 3, 11, seed=9)
    plain = relative_error(slim(held), dense(held))
    assert compensate(slim, dense, plan, [x]) == 2
    assert torch.equal(slim.state_dict()["twice.weight"], dense.state_dict()["twice.weight"])
    assert relative_error(slim(held), dense(held)) < plain
