"""Gates are identity at the start; closing is exact; stripping gives the captured network back."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, fx, nn

from sluice import models
from sluice.core.errors import SluiceError
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.gates.gating import Gated, close_gates, insert_gates, masked_norm, strip_gates
from sluice.passes.graph.capture import capture
from sluice.passes.search_space import find_search_space, read_torch
from sluice.runtime.base.compare import assert_close, relative_error
from tests.networks import NETWORKS, build, random_kept

# Widths differ by up to two orders of magnitude between networks of the field, so does what rounding adds up to.
REFERENCE = ("resnet20", "vgg16_bn", "mobilenet_v2", "densenet", "se_resnet", "resnet1d")


@functools.cache
def captured(name: str) -> fx.GraphModule:
    return capture(*build(name))


@functools.cache
def gated(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Gated]:
    model, inputs = build(name)
    return model, inputs, insert_gates(captured(name), inputs)


def harden(network: Gated, kept: dict[str, list[int]]) -> None:
    for site, gate in network.gates.items():
        gate.set_decision(torch.isin(torch.arange(gate.size), torch.tensor(kept[site])))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_closing_is_exact(name: str) -> None:
    model, inputs, network = gated(name)
    for gate in network.gates._modules.values():
        gate.hard.fill_(False)  # type: ignore[union-attr,operator]
        gate.logit.fill_(2.0)  # type: ignore[union-attr,operator]
    assert_close(network(*inputs), model(*inputs), what="gates at their start")
    analysis = network.meta["space"].analysis
    changes = []
    for seed in range(2):
        kept = random_kept(analysis, seed)
        harden(network, kept)
        closed = close_gates(network, kept)
        assert_close(closed(*inputs), network(*inputs), what=f"closed, seed {seed}")
        assert not hasattr(closed, "gates")
        assert closed.state_dict().keys() == model.state_dict().keys()
        changes.append(relative_error(closed(*inputs), model(*inputs)))
    assert max(changes) > 1e-2, "the plans must remove something that is seen"


@pytest.mark.parametrize("name", NETWORKS)
def test_stripping_gives_the_captured_network_back(name: str) -> None:
    _, inputs, network = gated(name)
    dense, stripped = captured(name), strip_gates(network)
    assert stripped.code == dense.code
    assert [n.name for n in stripped.graph.nodes] == [n.name for n in dense.graph.nodes]
    state = dense.state_dict()
    assert list(stripped.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in stripped.state_dict().items())
    assert capture(stripped, inputs) is not stripped
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with torch.no_grad():
        for parameter in stripped.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items()), "the gated network is left alone"


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_trains(name: str) -> None:
    inputs = build(name)[1]
    network = insert_gates(captured(name), inputs, steps=5).train()
    out = network(*inputs)
    sum(o.square().sum() for o in (out.values() if isinstance(out, dict) else [out])).backward()
    assert all(g.logit.grad is not None and g.logit.grad.abs().sum() > 0 for _, g in network.gates.items())
    assert all(g.fisher.sum() > 0 for _, g in network.gates.items())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in network.parameters())
    network.step()
    assert int(network.gates.progress) == 1


def test_gates_and_their_schedule_survive_state_dict() -> None:
    model, inputs, _ = gated("norms")
    network = insert_gates(model, inputs, steps=7)
    for _ in range(3):
        network.step()
    for _, gate in network.gates.items():
        gate.logit.data.uniform_(-1.0, 1.0)
    again = insert_gates(model, inputs, steps=7)
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert_close(again(*inputs), network(*inputs), 0.0)
    assert int(again.gates.progress) == 3


def test_trained_weights_are_closed() -> None:
    """Closing works on the weights as they are, not as they were when the gates went in."""
    model, inputs, _ = gated("in_place")
    network = insert_gates(model, inputs)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.3)
        kept = random_kept(network.meta["space"].analysis, 0)
        harden(network, kept)
        assert_close(close_gates(network, kept)(*inputs), network(*inputs))


def test_caller_and_closed_are_separate() -> None:
    model, inputs = build("plain")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network = insert_gates(model, inputs)
    close_gates(network, {"conv1": [0]})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(network.state_dict()[k], v) for k, v in before.items())


def test_excluded_layers_have_no_gate() -> None:
    model, inputs = build("plain")
    network = insert_gates(model, inputs, exclude=["conv2"])
    assert list(network.gates) == ["conv1", "fc1"]


def test_errors() -> None:
    model, inputs = build("plain")
    network = insert_gates(model, inputs)
    with pytest.raises(SluiceError, match="no group 'conv9'"):
        close_gates(network, {"conv9": [0]})
    with pytest.raises(SluiceError, match="would lose all 7 channels"):
        close_gates(network, {"conv1": []})

    with pytest.raises(SluiceError, match="has gates already"):
        insert_gates(network, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_other_precisions(dtype: torch.dtype) -> None:
    model, inputs = build("norms")
    model, inputs = model.to(dtype), tuple(x.to(dtype) for x in inputs)
    network = insert_gates(model, inputs)
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    assert network(*inputs).dtype == dtype
    assert_close(network(*inputs), model(*inputs), tolerance)
    kept = random_kept(network.meta["space"].analysis, 0)
    harden(network, kept)
    closed = close_gates(network, kept)
    assert closed(*inputs).dtype == dtype
    assert_close(closed(*inputs), network(*inputs), tolerance)


def test_masked_norm_is_the_norm_of_the_kept_channels() -> None:
    x, mask = torch.randn(3, 8, 5, 2), torch.tensor([1, 0, 1, 1, 0, 1, 1, 1.0])
    keep = mask.bool()
    grouped = masked_norm(x, mask.view(1, 8, 1, 1), None, None, [2, 3, 4], 2, 1e-5)
    assert_close(grouped[:, keep], nn.functional.group_norm(x[:, keep], 2), 1e-5)
    y, weight = torch.randn(4, 8), torch.rand(8)
    layered = masked_norm(y, mask.view(1, 8), weight, weight, [1], 0, 1e-5)
    expected = nn.functional.layer_norm(y[:, keep], (6,), weight[keep], weight[keep])
    assert_close(layered[:, keep], expected, 1e-5)


@pytest.mark.parametrize("name", ["resnet20", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
@torch.no_grad()
def test_reference_networks(name: str) -> None:
    check_reference(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in REFERENCE if n not in ("resnet20", "mobilenet_v2")])
@torch.no_grad()
def test_more_reference_networks(name: str) -> None:
    check_reference(name, 5)


def check_reference(name: str, plans: int) -> None:
    inputs = models.example_inputs(name, 2)
    model = models.enliven(getattr(models, name)(), 0, inputs)
    network = insert_gates(model, inputs)
    assert_close(network(*inputs), model(*inputs), 1e-6)
    for seed in range(plans):
        kept = random_kept(network.meta["space"].analysis, seed)
        harden(network, kept)
        assert_close(close_gates(network, kept)(*inputs), network(*inputs))


class Picks(nn.Module):
    """(N, 3, 9, 9) to (N, 4): a literal list of positions, which no network saves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 9, 3), nn.Conv2d(9, 11, 3), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).index_select(2, torch.tensor([0, 2, 3]))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def test_constants_are_no_tensors_of_the_gated_network() -> None:
    """A plan names the tensors of the model; a constant among them would make it another model."""
    model, x = Picks().eval(), torch.randn(2, 3, 9, 9)
    network = insert_gates(model, x)
    for one in (network, strip_gates(network)):
        assert {name for name in one.state_dict() if not name.startswith("gates.")} == set(model.state_dict())


class Standardised(nn.Module):
    """A convolution whose rows have mean zero: masked columns would not stay zero, so masks go before it or nowhere."""

    def __init__(self, between: nn.Module):
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 10, 3), between
        self.second, self.head = nn.Conv2d(10, 7, 3), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.between(self.first(x)), self.second.weight
        x = nn.functional.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True), self.second.bias)
        return self.head(x.relu().mean((2, 3)))


class PaddedPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(nn.functional.pad(x.relu(), (0, 1, 0, 1), value=-torch.inf), 3, 2)


@torch.no_grad()
def test_masks_reach_through_padding_with_the_least_value() -> None:
    torch.manual_seed(0)
    model, x = Standardised(PaddedPool()).eval(), torch.randn(2, 3, 14, 14)
    network = insert_gates(model, x).eval()
    kept = {"first": [0, 3, 4, 8], "second": list(range(7))}
    harden(network, kept)
    dense = capture(model, x)
    plan = make_plan(read_torch(dense).analysis, kept)
    closed, slim = close_gates(network, kept), rewrite_torch(dense, plan, (x,)).eval()
    assert_close(closed(x), slim(x), what="closed and cut")
    assert relative_error(closed(x), model(x)) > 1e-2


def test_a_group_that_no_mask_can_close_is_left_alone() -> None:
    model, x = Standardised(nn.Sigmoid()).eval(), torch.randn(2, 3, 14, 14)
    space = find_search_space(read_torch(capture(model, x)))
    assert [group.name for group in space.analysis.groups] == ["second"]
    assert "no tensor before conv2d (conv2d_1) that a mask could multiply" in space.left_alone["first"]
