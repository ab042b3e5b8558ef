"""Residual blocks: what is one, what is none and why, and what closes it; the same from torch and from ONNX."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice import models
from sluice.models.mobilenet import InvertedResidual
from sluice.models.resnet import ResNet
from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.blocks import find_blocks
from sluice.passes.graph.capture import capture
from sluice.passes.graph.static_shapes import static_graph
from sluice.passes.graph.view import GraphView, Node
from sluice.passes.graph.view_onnx import view_onnx
from sluice.passes.graph.view_torch import view_torch
from tests.networks import NETWORKS, build

REFERENCE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (lambda: models.resnet20(widths=(4, 5, 6)), (1, 7, 9)),
    "resnet32": (lambda: ResNet(5, widths=(3, 4, 5)), (1, 9, 7)),
    "se_resnet": (lambda: models.se_resnet(widths=(4, 5, 6)), (1, 7, 9)),
    "mobilenet_v2": (lambda: models.mobilenet_v2(width=0.2), (1, 12, 9)),
    "resnet1d": (lambda: models.resnet1d(widths=(4, 5, 6)), (2, 31)),
}


class Net(nn.Module):
    """Stem, the given middle, mean, head; (N, 3, 6, 5) to (N, 2)."""

    def __init__(self, middle: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.stem, self.bn, self.middle = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), middle
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(torch.tanh(self.bn(self.stem(x)))).mean((2, 3)))


class Middle(nn.Module):
    """Layers by name and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(kernel: int = 3, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(4, 4, kernel, padding=kernel // 2, bias=bias)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape) + 0.5)


def _nested(m: Middle, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    return x + m.d(y + m.c(F.gelu(m.b(y))))


def _in_place(m: Middle, x: Tensor) -> Tensor:
    y = m.b(F.relu(m.a(x)))
    y += x
    return F.silu(y, inplace=True) + m.c(F.relu(x, inplace=True))


# name -> middle, names of the blocks found, what they close with ("" where not), reasons for refusal.
CASES: dict[str, tuple[Callable[[], Middle], dict[str, tuple[str, ...] | str], dict[str, str]]] = {
    "nested": (
        lambda: Middle(_nested, a=conv(), b=conv(), c=conv(), d=conv(1)),
        {"middle": ("c.bias", "c.weight"), "middle#2": ("d.bias", "d.weight")},
        {},
    ),
    "projection": (
        lambda: Middle(
            lambda m, x: m.p(x) + m.n(m.b(F.relu(m.a(x)))), a=conv(), b=conv(), n=nn.BatchNorm2d(4), p=conv(1)
        ),
        {"middle": ("n.bias", "n.weight")},
        {},
    ),
    "projection of two": (
        lambda: Middle(lambda m, x: m.c(F.relu(m.a(x))) + m.q(m.p(x)), a=conv(), c=conv(), p=conv(1), q=conv(1)),
        {},
        {"middle": "the shortcut has 2 convolutions or linear layers, the branch 2"},
    ),
    "pooled shortcut": (
        lambda: Middle(lambda m, x: m.a(F.avg_pool2d(x, 2)) + F.max_pool2d(x, 2), a=conv()),
        {"middle.a": ("a.bias", "a.weight")},
        {},
    ),
    "broadcast": (
        lambda: Middle(lambda m, x: x + m.a(x.mean((2, 3), keepdim=True)), a=conv(1)),
        {},
        {"middle.a": "shapes (10007, 4, 1, 1) and (10007, 4, 6, 5)"},
    ),
    "position": (lambda: Middle(lambda m, x: m.a(x + m.position), a=conv(), position=parameter(1, 4, 6, 5)), {}, {}),
    "doubled": (lambda: Middle(lambda m, x: (y := m.a(x)) + y, a=conv()), {}, {}),
    "no layer": (
        lambda: Middle(lambda m, x: m.a(x) + torch.sin(m.a(x)) * m.s, a=nn.PReLU(4), s=parameter(4, 1, 1)),
        {},
        {"middle.a": "no operand has a convolution or linear layer of its own"},
    ),
    "shared weight": (
        lambda: Middle(lambda m, x: m.a(x + m.a(F.relu(x))), a=conv()),
        {},
        {"middle.a": "tensor 'middle.a.bias' is read outside the branch as well"},
    ),
    "sigmoid": (lambda: Middle(lambda m, x: x + torch.sigmoid(m.a(x)), a=conv()), {"middle.a": "sigmoid"}, {}),
    "shifted": (lambda: Middle(lambda m, x: x + (m.a(x) + 1.0), a=conv()), {"middle.a": "add"}, {}),
    "no affine": (
        lambda: Middle(lambda m, x: x + m.n(m.a(x)), a=conv(), n=nn.BatchNorm2d(4, affine=False)),
        {"middle": "atch"},
        {},
    ),
    "layer scale": (
        lambda: Middle(lambda m, x: x + m.s * m.a(F.gelu(m.b(x))), a=conv(), b=conv(1), s=parameter(4, 1, 1)),
        {"middle": ("a.bias", "a.weight")},
        {},
    ),
    "group norm": (
        lambda: Middle(lambda m, x: x + F.relu6(m.n(m.a(x))), a=conv(bias=False), n=nn.GroupNorm(2, 4)),
        {"middle": ("n.bias", "n.weight")},
        {},
    ),
    "channels last": (
        lambda: Middle(lambda m, x: x + F.silu(m.a(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2), a=nn.Linear(4, 4)),
        {"middle.a": ("a.bias", "a.weight")},
        {},
    ),
    "two ends": (
        lambda: Middle(
            lambda m, x: x + torch.cat([m.a(x), m.b(F.relu(x))], 1), a=nn.Conv2d(4, 3, 1), b=nn.Conv2d(4, 1, 1)
        ),
        {"middle": ("a.bias", "a.weight", "b.bias", "b.weight")},
        {},
    ),
    "inverted": (
        lambda: Middle(lambda m, x: m.a(x), a=InvertedResidual(4, 4, 1, 2)),
        {"middle.a.conv": ("a.conv.7.bias", "a.conv.7.weight")},
        {},
    ),
    "in place": (
        lambda: Middle(_in_place, a=conv(), b=conv(), c=conv()),
        {"middle": ("b.bias", "b.weight")},
        {"middle#2": "has the same tensors as block 'middle'"},
    ),
}


@functools.cache
def case(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        inputs = (torch.randn(3, 3, 6, 5),)
        return models.enliven(Net(CASES[name][0]()), 1, inputs), inputs


@functools.cache
def reference(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    factory, shape = REFERENCE[name]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        inputs = (torch.randn(3, *shape),)
        return models.enliven(factory(), 1, inputs), inputs


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_networks(name: str) -> None:
    model, inputs = reference(name)
    gm = capture(model, inputs)
    found, refused = find_blocks(view_torch(gm))
    if name == "mobilenet_v2":
        numbers = [i for i, block in enumerate(model.blocks) if block.residual]  # type: ignore[arg-type,union-attr]
        expected, norm = [f"blocks.{i}.conv" for i in numbers], ""
        assert len(expected) == 12 and all(block.identity for block in found)
    elif name == "resnet1d":
        expected, norm = [f"blocks.{i}" for i in range(6)], "bn2"
    else:
        per_stage = {"resnet20": 3, "resnet32": 5, "se_resnet": 3}[name]
        expected, norm = [f"stages.{i}.{j}" for i in range(3) for j in range(per_stage)], "bn2"
    assert [block.name for block in found] == expected and not refused
    state = model.state_dict()
    for block in found:
        inside = {n for n in state if n.startswith(block.name + ".") and "shortcut" not in n and "tracked" not in n}
        assert set(block.params) == inside and list(block.params) == sorted(inside)
        norms = [n.split(".")[-2] for n in state if n.startswith(f"{block.name}.") and n.endswith("running_mean")]
        last = norm or max(norms, key=int)  # numbered within a bottleneck, which may have two or three
        assert block.closing == (f"{block.name}.{last}.bias", f"{block.name}.{last}.weight")
        assert set(block.layers) == {n for n in inside if state[n].ndim > 2}
        assert block.drop().params == block.params and len(block.fork) == 1
    assert [b.name for b in found if not b.identity] == [
        n for n in expected if any(p.startswith(f"{n}.shortcut.") for p in state)
    ]


@pytest.mark.parametrize("network", [models.densenet(growth=2), models.vgg16_bn(widths=(2, 3, 4, 5, 6))])
def test_networks_without_blocks(network: nn.Module) -> None:
    inputs = models.example_inputs("vgg16_bn")
    gm = capture(network.eval(), inputs)
    assert find_blocks(view_torch(gm)) == ((), {})
    assert find_blocks(view_onnx(to_onnx(gm, inputs))) == ((), {})


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    model, inputs = case(name)
    _, blocks, reasons = CASES[name]
    found, refused = find_blocks(view_torch(capture(model, inputs)))
    assert {block.name for block in found} == set(blocks)
    for block in found:
        closes = blocks[block.name]
        if isinstance(closes, str):
            assert block.closing is None and closes in block.reason
        else:
            assert block.closing == tuple(f"middle.{n}" for n in closes) and not block.reason
    assert set(refused) == set(reasons)
    assert all(reasons[n] in why for n, why in refused.items()), refused


class Beside(nn.Module):
    """Networks side by side, since an export costs more than what is in it; every one has its own inputs."""

    def __init__(self, networks: dict[str, tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
        super().__init__()
        self.sides = nn.ModuleDict({f"the {name}": network for name, (network, _) in networks.items()})
        self.reads = [len(inputs) for _, inputs in networks.values()]

    def forward(self, *xs: Tensor) -> list[Tensor | dict[str, Tensor]]:
        ends = itertools.accumulate(self.reads)
        return [side(*xs[end - n : end]) for side, n, end in zip(self.sides.values(), self.reads, ends, strict=True)]


def beside(networks: dict[str, tuple[nn.Module, tuple[Tensor, ...]]]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Beside(networks).eval(), tuple(x for _, inputs in networks.values() for x in inputs)


EXPORTED: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "cases": lambda: beside({name: case(name) for name in CASES}),
    "networks": lambda: beside({name: build(name) for name in NETWORKS}),
    **{name: functools.partial(reference, name) for name in REFERENCE},
}
# Nothing is in them that the others lack, but for the number of blocks.
LONG = ("resnet32", "mobilenet_v2", "se_resnet")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in EXPORTED])
def test_onnx_says_the_same(name: str) -> None:
    model, inputs = EXPORTED[name]()
    gm = capture(model, inputs)
    dense = to_onnx(gm, inputs)
    found, refused = find_blocks(view_torch(gm))
    if name == "cases":
        assert {b.name.split(".")[1] for b in found} == {f"the {n}" for n, (_, blocks, _) in CASES.items() if blocks}
        assert len(found) == sum(len(blocks) for _, blocks, _ in CASES.values())

    def brief(view: GraphView) -> list[tuple[object, ...]]:
        blocks, _ = find_blocks(view)
        return [(b.name, b.params, b.layers, b.closing, b.identity, len(b.fork)) for b in blocks]

    expected = brief(view_torch(gm))
    assert [b[0] for b in expected] == [b.name for b in found]
    assert brief(view_onnx(dense)) == expected
    assert brief(view_onnx(dense, named=gm.state_dict())) == expected
    assert brief(view_onnx(static_graph(dense, 2))) == expected
    assert len(find_blocks(view_onnx(dense))[1]) == len(refused)
    assert all(refused.values())


def test_separate_inputs_are_no_residual() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(self.b(F.relu(self.a(x))) + y)

    found, refused = find_blocks(view_torch(capture(Two(), (torch.randn(2, 3), torch.randn(2, 4)))))
    assert not found
    assert refused == {"a": "its operands have no activation in common that both start from"}


def test_a_condition_beside_the_fork() -> None:
    """An embedding that every branch reads is not where the shortcut starts."""

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 4)
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            t = torch.tanh(self.embed(x))
            y = t + self.b(F.relu(self.a(t)))
            return y + self.d(F.relu(self.c(y)) * t)

    found, refused = find_blocks(view_torch(capture(Conditioned(), torch.randn(2, 3))))
    assert [(b.name, b.fork, b.identity) for b in found] == [("a", ("tanh",), True), ("c", ("add",), True)]
    assert not refused


def _view(*nodes: Node, shape: tuple[int, ...] | None = (3, 4), outputs: tuple[str, ...] = ("z",)) -> GraphView:
    values = {v for node in nodes for v in (*node.inputs, *node.outputs)}
    return GraphView(nodes, frozenset(outputs), frozenset(), dict.fromkeys(values, shape) if shape else {})


LAYER = Node("conv", "weighted", ("a",), ("x",), ("m.weight",), ("m.weight",))
SUM = Node("add", "sum", ("z",), ("a", "x"), (), (), None, True)


def test_rules_on_a_hand_made_graph() -> None:
    (block,), refused = find_blocks(_view(LAYER, SUM))
    assert (block.name, block.own, block.fork, block.closing) == ("m", ("a",), ("x",), ("m.weight",)) and not refused
    assert find_blocks(_view(LAYER, SUM, outputs=("z", "a")))[1]["z"].startswith("no operand has")
    spy = Node("spy", "other", ("s",), ("a",))
    assert find_blocks(_view(LAYER, spy, SUM, outputs=("z", "s")))[1]["z"].startswith("no operand has")
    assert find_blocks(_view(LAYER, SUM, shape=None))[1] == {"m": "the shape of an operand is unknown"}
    assert find_blocks(_view(LAYER, SUM, shape=None), strict=False)[0] == (block,)
    again = Node("add", "sum", ("y",), ("z", "x"), (), (), None, True)
    found, refused = find_blocks(_view(LAYER, SUM, again, outputs=("y",)))
    assert [b.name for b in found] == ["m"] and refused == {"m#2": "has the same tensors as block 'm'"}
