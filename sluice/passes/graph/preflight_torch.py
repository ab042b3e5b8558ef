"""What a network must be before anything of it is measured, tried in a second or two on a copy.

A plan, an ONNX file and a training after the cut keep a *function of the inputs*: weights in, outputs out. So, in eval
mode and on the example inputs:

1. The model is a module that can be copied, and runs.
2. It is a function: a call after another call gives the same outputs, the state of the random numbers being the same.
   Else `forward` computes with what it wrote, a streaming network's past for one. The call between is on other inputs.
   What is written without an effect on later outputs (a table made at the first call, a counter) does not matter.
3. It draws no random numbers that its outputs depend on: sampling, dropout that stays on.
4. It has the gradient of its operators. A graph keeps what an ``autograd.Function`` computes, not its own backward.
   Where one is found, the gradients of the captured network and of the user's are compared, parameter by parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sluice.core.errors import SluiceError, first_line

__all__ = ["check_function", "check_gradient", "check_module", "check_runs", "copied", "own_backwards"]

SAME = 1e-5  # relative to the scale of an output: two calls of a function
GRADIENT = 1e-3  # relative to the scale of a gradient
_PLAIN = (bool, int, float, str)
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def check_module(model: object) -> None:
    """Raises `SluiceError` unless ``model`` is a module."""
    if isinstance(model, nn.Module):
        return
    tensors = isinstance(model, Mapping) and any(isinstance(value, Tensor) for value in model.values())
    told = "a state_dict, which holds tensors and no forward()" if tensors else f"{type(model).__name__}"
    advice = "build the network, call its load_state_dict(), and give that" if tensors else "give a torch.nn.Module"
    raise SluiceError(f"the model is {told}; {advice}")


def copied(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode (rule 1)."""
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise SluiceError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}; keep no computed tensors in its attributes "
            "(for weight norm, torch.nn.utils.parametrizations.weight_norm)"
        ) from error


def check_function(source: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Rules 1 to 3, for a copy in eval mode; the state of the random numbers is left as it was.

    Raises:
        SluiceError: it does not run, or is no function of its inputs.
    """
    name, known, draws = type(source).__name__, _state(source), _Draws()
    with _seeded(source) as seed, torch.no_grad():
        seed()
        with draws:
            first = check_runs(source, args, kwargs)
        if not first:
            raise SluiceError(f"forward() of {name} returns no tensor; let it return what the network computes")
        try:
            halved = pytree.tree_map_only(Tensor, lambda t: t * 0.5 if t.is_floating_point() else t, (args, kwargs))
            _outputs(source, *halved)
        except Exception:  # inputs that this network does not take; the next call follows the first, then
            pass
        seed()
        same = _same(first, _outputs(source, args, kwargs))
        drawn = same and draws.found and not _same(first, _outputs(source, args, kwargs))
    if drawn:
        raise SluiceError(
            f"forward() of {name} draws random numbers in eval mode ({', '.join(draws.found[:3])}), and its outputs "
            "depend on them; make the draw an input, or leave it out unless self.training"
        )
    if same:
        return
    written = _written(known, _state(source))
    if written:
        raise SluiceError(
            f"forward() of {name} writes {', '.join(map(repr, written[:3]))} and computes with it in later calls, "
            "which neither an ONNX file nor a plan keeps; make it an input and an output of forward()"
        )
    raise SluiceError(
        f"{name} is not deterministic: two calls on the same inputs differ in eval mode; "
        "let its outputs depend on its inputs and weights alone"
    )


def check_runs(module: nn.Module, args: Args, kwargs: Kwargs) -> list[Tensor]:
    """The tensors that a call returns.

    Raises:
        SluiceError: the call fails.
    """
    try:
        with torch.no_grad():
            return _outputs(module, args, kwargs)
    except Exception as error:
        raise SluiceError(
            f"the model does not run on the example inputs {_shapes(args, kwargs)}: {first_line(error)}; "
            "give inputs as its forward() takes them (on the command line --input NAME=1,3,32,32:float32 for each)"
        ) from error


def own_backwards(source: nn.Module, args: Args, kwargs: Kwargs) -> tuple[str, ...]:
    """The ``autograd.Function``s between trainable parameters and outputs; ``source`` is a copy that is used up."""
    if not any(p.requires_grad for p in source.parameters()):
        return ()
    with _seeded(source), torch.enable_grad():
        try:
            outputs = _outputs(source, args, kwargs)
        except Exception:  # a network that runs without gradients alone is not trained through
            return ()
    stack: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen, found = set(stack), []
    while stack:
        function = stack.pop()
        if isinstance(function, torch.autograd.function.BackwardCFunction):
            found.append(type(function).__name__.removesuffix("Backward"))
        for before, _ in function.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                stack.append(before)
    return tuple(dict.fromkeys(found))


def check_gradient(captured: nn.Module, model: nn.Module, args: Args, kwargs: Kwargs, functions: Sequence[str]) -> None:
    """Rule 4, of two networks in eval mode; ``functions`` are those of `own_backwards`.

    Raises:
        SluiceError: a parameter has another gradient in the captured network.
    """
    have, want = (_gradients(module, args, kwargs) for module in (captured, model))
    for name, gradient in want.items():
        found = have.get(name)
        scale = float(gradient.abs().max())
        far = scale if found is None else float((found - gradient).abs().max())
        if far > GRADIENT * scale:
            raise SluiceError(
                f"the backward() of {', '.join(map(repr, functions[:3]))} is lost in the graph, so {name!r} would get "
                "another gradient; write it with operators, as x + (f(x) - x).detach() to pass gradients by f"
            )


def _gradients(module: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        leaves = [t for t in _outputs(module, args, kwargs) if t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        total = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in leaves)
        if not isinstance(total, Tensor):
            return {}
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def _outputs(module: nn.Module, args: Args, kwargs: Kwargs) -> list[Tensor]:
    """The tensors that a call returns, on copies of the inputs, since forward() may write into them."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
    return [t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor)]


def _same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    if [t.shape for t in left] != [t.shape for t in right]:
        return False
    for a, b in zip(left, right, strict=True):
        a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
        scale = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
        if not torch.allclose(a, b, rtol=0.0, atol=SAME * scale, equal_nan=True):
            return False
    return True


def _state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What every tensor and plain attribute is now: a tensor by itself and how often it was written."""
    found: dict[str, tuple[Any, ...]] = {}
    for path, part in module.named_modules():
        own = {n: v for n, v in vars(part).items() if not n.startswith("_") and n != "training"}
        for leaf, value in {**own, **part._buffers, **part._parameters}.items():
            name = f"{path}.{leaf}" if path else leaf
            if isinstance(value, Tensor):
                found[name] = (value, value._version)
            elif isinstance(value, _PLAIN):
                found[name] = (value, 0)
            elif isinstance(value, (list, tuple, dict, set)):
                found[name] = (value, len(value))
    return found


def _written(before: Mapping[str, tuple[Any, ...]], after: Mapping[str, tuple[Any, ...]]) -> list[str]:
    def changed(name: str) -> bool:
        (old, count), (new, now) = before.get(name, (None, 0)), after[name]
        return count != now or (old != new if isinstance(new, _PLAIN) else old is not new)

    return [name for name in after if changed(name)]


class _Draws(TorchDispatchMode):
    """The operators that drew random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").partition(".")[0]
        if torch.Tag.nondeterministic_seeded in func.tags and name not in self.found:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _seeded(module: nn.Module) -> Iterator[Any]:
    """A function that seeds torch; afterwards the random numbers go on as if nothing had been drawn."""
    devices = {t.device for t in (*module.parameters(), *module.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng([d.index or 0 for d in devices]):
        yield lambda: torch.manual_seed(0)


def _shapes(args: Args, kwargs: Kwargs) -> str:
    """The shapes of the tensors among inputs, for a sentence."""
    leaves = pytree.tree_leaves((args, kwargs))
    return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in leaves)
