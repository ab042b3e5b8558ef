"""Random networks: a stem, a few random parts, a head.

1. A part is a function of random numbers and of the width that comes in. It returns a module and the width that goes
   out. Widths are odd and drawn anew, so two axes have one size only by chance or where they must.
2. Functions that jump (sign, round, hard thresholds) are left out: a rounding error moves a number across the jump.
3. The head reads magnitudes: a mean of what a norm has centred is zero but for rounding errors, whatever was cut.
4. Every channel is alive (`sluice.models.enliven`), so a cut at a wrong place changes the result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.models import enliven
from sluice.models.mobilenet import InvertedResidual
from tests.grammar_operators import operator_case
from tests.sequences import Attention

__all__ = ["KINDS", "random_network"]

Random = np.random.Generator
Part = Callable[[Random, int, int], tuple[nn.Module, int]]  # random numbers, width, spatial axes

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, torch.tanh, F.softsign,
    torch.sigmoid, F.hardsigmoid, F.softplus, F.logsigmoid, F.softshrink, torch.neg, torch.abs, torch.erf, torch.sin,
    torch.cos, torch.square,
    lambda x: F.hardtanh(x, -0.5, 1.5), lambda x: x.clamp(0.1, 2.0), lambda x: torch.exp(-x.abs()),
    lambda x: torch.log(x.abs() + 1.0), lambda x: torch.sqrt(x.abs() + 0.1), lambda x: torch.rsqrt(x * x + 1.0),
    lambda x: torch.reciprocal(x.abs() + 1.0), lambda x: x.pow(2) * 0.3, lambda x: (1.0 - x) / 3.0,
    lambda x: torch.maximum(x, -0.3 * x), lambda x: torch.where(x > 0, x, 0.2 * x), lambda x: x * torch.sigmoid(x),
)  # fmt: skip


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module):
        super().__init__()
        self.function, self.layers = function, nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers.values())


def width(rng: Random) -> int:
    return int(rng.integers(4, 12))


def conv(dims: int, into: int, out: int, kernel: int = 3, **options: object) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return kind(into, out, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


def norm(rng: Random, dims: int, size: int) -> nn.Module:
    groups = next(g for g in (3, 2, 1) if size % g == 0)
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    makers = (batch, batch, batch, lambda n: nn.GroupNorm(groups, n), lambda n: instance(n, affine=True))
    return makers[rng.integers(len(makers))](size)


def activation(rng: Random) -> nn.Module:
    if rng.random() < 0.5:
        return nn.ReLU()
    return Apply(ACTIVATIONS[rng.integers(len(ACTIVATIONS))])


def layer(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    out, bias = width(rng), bool(rng.integers(2))
    kernel, stride = int(rng.choice([1, 3])), int(rng.choice([1, 1, 2]))
    own = conv(dims, size, out, kernel, stride=stride, bias=bias)
    return nn.Sequential(own, norm(rng, dims, out), activation(rng)), out


def run_of_layers(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    middle, out = width(rng), width(rng)
    parts = [conv(dims, size, middle, 1), nn.ReLU(), conv(dims, middle, out), nn.Identity()]
    return nn.Sequential(*parts, nn.ReLU()), out


def residual(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    middle = width(rng)
    out = size if rng.random() < 0.6 else width(rng)
    branch = nn.Sequential(conv(dims, size, middle), norm(rng, dims, middle), activation(rng), conv(dims, middle, out))
    branch.append(norm(rng, dims, out) if rng.random() < 0.7 else nn.Identity())
    short = nn.Identity() if out == size else conv(dims, size, out, 1)
    last = activation(rng) if rng.random() < 0.5 else nn.Identity()
    return nn.Sequential(Apply(lambda x, a, b: a(x) + b(x), branch=branch, short=short), last), out


def mobile(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    if dims != 2:
        return depthwise(rng, size, dims)
    out = size if rng.random() < 0.6 else width(rng)
    return InvertedResidual(size, out, 1, int(rng.integers(1, 4))), out


def depthwise(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    out, times = width(rng), int(rng.integers(1, 3))
    first = conv(dims, size, size * times, groups=size)
    return nn.Sequential(first, activation(rng), conv(dims, size * times, out, 1)), out


def grouped(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    middle, out = 2 * width(rng), 2 * width(rng)
    return nn.Sequential(conv(dims, size, middle, 1), activation(rng), conv(dims, middle, out, groups=2)), out


def joined(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    a, b = width(rng), width(rng)
    sides = {"a": conv(dims, size, a, 1), "b": conv(dims, size, b)}
    return Apply(lambda x, f, g: torch.cat([f(x), x, F.relu(g(x))], 1), **sides), a + size + b


def split(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    half = width(rng)

    def apply(x: Tensor, first: nn.Module) -> Tensor:
        a, b = first(x).chunk(2, 1)
        return a * torch.sigmoid(b)

    return Apply(apply, first=conv(dims, size, 2 * half, 1)), half


def gate_linear(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    half = width(rng)
    return Apply(lambda x, first: F.glu(first(x), 1), first=conv(dims, size, 2 * half, 1)), half


def excite(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    middle, axes = width(rng), tuple(range(2, 2 + dims))

    def apply(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
        return x * torch.sigmoid(up(F.relu(down(x.mean(axes, keepdim=True)))))

    return Apply(apply, down=conv(dims, size, middle, 1), up=conv(dims, middle, size, 1)), size


def pooled(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    chosen = (pool, average)[rng.integers(2)]
    return Apply(lambda x: chosen(x, 3, 1, 1)), size


def resized(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    if rng.integers(2):
        return Apply(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest")), size
    return Apply(lambda x: F.pad(x, (1, 0), value=0.4)), size


def transposed(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    out, kind = width(rng), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return nn.Sequential(kind(size, out, 2, stride=2), activation(rng)), out


def shuffled(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    middle = 2 * width(rng)

    def apply(x: Tensor, first: nn.Module) -> Tensor:
        y = first(x)
        return y.view(y.shape[0], 2, middle // 2, *y.shape[2:]).transpose(1, 2).reshape(y.shape)

    return Apply(apply, first=conv(dims, size, middle, 1)), middle


def channels_last(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    middle = width(rng)

    def apply(x: Tensor, norm: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
        y = x.movedim(1, -1)
        return x + down(F.gelu(up(norm(y)))).movedim(-1, 1)

    return Apply(apply, norm=nn.LayerNorm(size), up=nn.Linear(size, middle), down=nn.Linear(middle, size)), size


def shared(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    return Apply(lambda x, f: f(F.relu(f(x))), f=conv(dims, size, size)), size


def parametric(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    out = width(rng)
    return nn.Sequential(conv(dims, size, out, 1), nn.PReLU(out), nn.Dropout(0.3)), out


def perceptron(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    middle, scale = width(rng), (nn.LayerNorm, nn.RMSNorm)[rng.integers(2)]
    own = nn.Sequential(scale(size), nn.Linear(size, middle), activation(rng), nn.Linear(middle, size))
    return Apply(lambda x, f: x + f(x), f=own), size


def attention(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    own = Attention(size, F.scaled_dot_product_attention, fused=bool(rng.integers(2)))
    return Apply(lambda x, norm, f: x + f(norm(x)), norm=nn.LayerNorm(size), f=own), size


def swiglu(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    middle = width(rng)
    sides = {"a": nn.Linear(size, middle), "b": nn.Linear(size, middle), "c": nn.Linear(middle, size)}
    return Apply(lambda x, a, b, c: x + c(F.silu(a(x)) * b(x)), **sides), size


def projected(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    out = width(rng)
    return nn.Sequential(nn.Linear(size, out), activation(rng)), out


def recurrent(rng: Random, size: int, dims: int) -> tuple[nn.Module, int]:
    out, kind, both = width(rng), (nn.LSTM, nn.GRU)[rng.integers(2)], bool(rng.integers(2))
    own = kind(size, out, batch_first=True, bidirectional=both)
    return Apply(lambda x, f: f(x)[0], f=own), out * (1 + both)


PARTS: tuple[Part, ...] = (
    layer, layer, residual, residual, run_of_layers, mobile, depthwise, grouped, joined, split, gate_linear, excite,
    pooled, resized, transposed, shuffled, channels_last, shared, parametric,
)  # fmt: skip
TOKENS: tuple[Part, ...] = (perceptron, attention, swiglu, projected, recurrent)
ROWS: tuple[Part, ...] = (perceptron, swiglu, projected)
SPREAD: dict[tuple[Part, ...], Callable[[Tensor], Tensor]] = {
    PARTS: lambda x: x.flatten(2).abs().mean(2),
    TOKENS: lambda x: x.abs().mean(1),
    ROWS: lambda x: x,
}
KINDS = ("image", "image", "image", "line", "volume", "tokens")
BATCH = 3
SPATIAL = {"line": (11,), "image": (7, 6), "volume": (5, 4, 3)}


class Network(nn.Module):
    """A stem, parts and a head; ``beside`` them a network with a head of its own, for a second input."""

    def __init__(self, stem: nn.Module, parts: list[nn.Module], head: nn.Module, spread: Callable[[Tensor], Tensor],
                 beside: nn.Module | None) -> None:  # fmt: skip
        super().__init__()
        self.stem, self.parts, self.head, self.spread, self.beside = stem, nn.Sequential(*parts), head, spread, beside

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        y = self.head(self.spread(self.parts(F.gelu(self.stem(x)))))
        return y if self.beside is None else y + self.beside(*others)


def random_stem(rng: Random) -> tuple[nn.Module, tuple[int, ...], str]:
    """One layer, the shape of its input without the batch, and the kind of network."""
    kind, size = KINDS[rng.integers(len(KINDS))], width(rng)
    if kind == "tokens":
        return nn.Linear(3, size), (5, 3), kind
    return conv(len(SPATIAL[kind]), 3, size), (3, *SPATIAL[kind]), kind


def random_network(seed: int) -> tuple[nn.Module, tuple[Tensor, ...], str]:
    """A network in eval mode with every channel alive, an input, and the names of its parts.

    One of four begins with a layer. The others begin with the next case of `tests.grammar_operators`, and have the one
    after that beside them.
    """
    rng = np.random.default_rng([seed, 28])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        beside, number = None, 2 * (seed - seed // 4 - 1)
        stem, shape, first = operator_case(number) if seed % 4 else random_stem(rng)
        inputs = [torch.randn(BATCH, *shape)]
        made = stem.eval()(*inputs)
        if isinstance(getattr(stem, "after", stem), nn.Linear):
            size, dims, choice = made.shape[-1], made.ndim - 2, TOKENS if made.ndim > 2 else ROWS
        else:
            size, dims, choice = made.shape[1], made.ndim - 2, PARTS
        modules, said = [], [first]
        for _ in range(rng.integers(1, 5)):
            part = choice[rng.integers(len(choice))]
            module, out = part(rng, size, dims)
            try:
                made = module.eval()(made)
            except ValueError:  # an instance norm of one position
                continue
            size = out
            modules.append(module)
            said.append(part.__name__)
        if seed % 4:
            other, shape, second = operator_case(number + 1)
            said.append(second)
            inputs.append(torch.randn(BATCH, *shape))
            beside = nn.Sequential(other.eval(), nn.Flatten(), nn.Linear(other(inputs[1]).flatten(1).shape[1], 3))
        network = Network(stem, modules, nn.Linear(size, 3), SPREAD[choice], beside)
    return enliven(network.eval(), seed, tuple(inputs)), tuple(inputs), " > ".join(said)
