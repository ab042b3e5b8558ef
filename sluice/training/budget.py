"""The budget in the training loss: expected milliseconds, and a multiplier that needs no tuning.

With ``T(w)`` the latency model at the gates' soft widths, ranks and switches (`sluice.training.expected_latency`), and
``B(k)`` the target at step k:

1. ``B`` falls linearly from the dense latency to the target over the first ``warmup_fraction`` of the steps, since a
   budget imposed at once removes channels before the loss has had a say (annealed budget).
2. The constraint is the ratio ``v = T / B(k) - 1 <= 0``, so one network's milliseconds look like another's.
3. ``penalty() = lambda * v`` with the gradient ``lambda * dv``: a Lagrangian whose multiplier follows ``v`` by dual
   ascent *in the log domain*,

       log(lambda) = log(unit) + integral + PROPORTIONAL * v,     integral += gain * v   (once per step),

   which finds small and large multipliers in the same number of steps. One-sided: the pull fades out between the
   target and 2% below it, so there is no pull once the budget is safely met, and the integral decays meanwhile.
4. ``unit = |d loss / d gates| / |d v / d gates|`` (running root mean squares over the gates' own parameters) is the
   multiplier at which the task and the budget pull equally hard. It makes the penalty follow the loss through any
   scale, loss scaling of mixed precision included. The task's share is the gradient that arrives at the gates minus
   the penalty's own, so the loss need not be handed over. By Cauchy-Schwarz any ``lambda > unit`` lowers the latency
   under gradient descent, whatever the task wants; ``lambda`` is therefore held below a few units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sluice.core.budget_spec import BudgetSpec
from sluice.core.errors import SluiceError
from sluice.core.latency import LatencyModel
from sluice.passes.gates.filter_gates import Gate, Gates
from sluice.solver.decide import least_ms, restricted, unreachable
from sluice.training.expected_latency import ExpectedLatency, alternatives, configured

if TYPE_CHECKING:
    from sluice.profiler.view import Profile

__all__ = ["Budget", "GateLike"]

PROPORTIONAL = 20.0  # 5% over the target multiplies the pull by e
MARGIN = 0.02  # relative distance below the target at which the pull has faded to nothing
DECAY = 0.95  # of the running mean squares, per step
LOG_RANGE = (-6.0, 1.0)  # of the integral: keeps it from winding up where the gates cannot answer
LOG_MOST = 1.5  # of lambda / unit: more would only fill the optimizer's second moments with the penalty
PATIENCE = 4096  # backward passes without step() after which the training loop must be wrong
RANK = "|rank"  # ends the name of a rank, behind the name of the switch of its form
SKIPS = 25  # non-finite gradients in a row that loss scaling may cause while it looks for its scale


class GateLike(Protocol):
    """A gate as the budget sees it: the value of its site in the latency model."""

    def soft_width(self) -> Tensor:
        """Expected number of kept channels, rank, or value of the switch; a differentiable scalar."""
        ...

    def width(self) -> int:
        """The value as it would be decided now."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class _Lagrangian(torch.autograd.Function):
    """``value`` forward; backward sends ``sent``, split over the gates, and tells how the loss is scaled."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, sent: Tensor, seen: Callable[[Tensor], None], *parameters: Tensor) -> Tensor:
        ctx.sent, ctx.seen, ctx.shapes = sent, seen, [p.shape for p in parameters]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        ctx.seen(scale[0])
        parts = (scale[0] * ctx.sent).split([s.numel() for s in ctx.shapes])
        return (None, None, None, *[part.view(s) for part, s in zip(parts, ctx.shapes, strict=True)])


class Budget:
    """Holds a gated network to ``target`` while it trains; add ``penalty()`` to the loss, call ``step()`` after it.

    Args:
        gated: the result of `sluice.insert_gates` (its ``step()`` then steps the budget too), or a mapping from
            site to gate: axis group, rank ``<weight>|<form>|rank``, or switch ``<block>|drop``. Sites of the model
            without a gate stay dense; whether a layer with a rank is factorised follows from its cost.
        latency: milliseconds as a function of the sites: a profile, or its latency model.
        target: ``"50%"``, ``"2.4ms"`` or ``{"latency_ms": 2.4}``, or one of these parsed.
        steps: number of optimizer steps the gates will be trained for (of a gated network: its own).
        warmup_fraction: share of the steps over which the target falls from dense to the budget.
        rate: speed of the dual ascent; the integral gains ``rate / steps`` (at most 2) times the violation per step.

    Raises:
        SluiceError: a gate the model does not know, or a target that no widths reach (said before any training).
    """

    def __init__(
        self,
        gated: nn.Module | Mapping[str, GateLike],
        latency: LatencyModel | Profile,
        target: str | Mapping[str, str | float] | BudgetSpec,
        *,
        steps: int | None = None,
        warmup_fraction: float = 0.4,
        rate: float = 1000.0,
    ) -> None:
        if not isinstance(latency, LatencyModel) and not hasattr(latency, "latency"):
            raise SluiceError(
                f"a budget needs measured latencies, not {latency!r}; "
                "pass what sluice.profile(model, inputs, table) returns"
            )
        model = latency if isinstance(latency, LatencyModel) else latency.latency
        self.profile = None if isinstance(latency, LatencyModel) else latency
        self.target = target if isinstance(target, BudgetSpec) else BudgetSpec.parse(target)
        inner = gated.gates if isinstance(gated, nn.Module) else None
        gates: Mapping[str, GateLike] = gated  # type: ignore[assignment]
        if isinstance(inner, Gates):
            steps = steps or inner.steps
            gates = _with_a_place(inner, self.profile)
        if steps is None:
            raise SluiceError("give steps=, the number of optimizer steps the gates will be trained for")
        unknown = [g for g in gates if g not in model.dense]
        if unknown or not gates:
            raise SluiceError(
                f"{'gate ' + repr(unknown[0]) if unknown else 'an empty set of gates'} has no place in the latency "
                f"model; its groups are {sorted(model.dense)}"
            )
        if steps < 1 or not 0 <= warmup_fraction <= 1:
            raise SluiceError(
                f"steps={steps}, warmup_fraction={warmup_fraction}; need steps >= 1 and a share in [0, 1]"
            )
        self.model = restricted(model, movable(model, frozenset(gates)))
        self._layers = alternatives(self.model, frozenset(gates))
        self.gates = dict(gates)
        self.steps, self.warmup_fraction = steps, warmup_fraction
        self.gain = min(rate / steps, 2.0)
        self.dense_ms = model.dense_ms()
        self.target_ms = self.target.ms(self.dense_ms)
        self.least_ms = least_ms(self.model).promised_ms
        if not self.feasible():
            structure = bool(self.model.switches & gates.keys()) or any(g.endswith(RANK) for g in gates)
            raise unreachable(self.target_ms, self.least_ms, self.dense_ms, structure=structure)
        self._latency = ExpectedLatency(self.model, layers=self._layers)
        self._parameters = [p for gate in gates.values() for p in gate.parameters() if p.requires_grad]
        if not self._parameters:
            raise SluiceError(f"none of the {len(gates)} gates has a parameter to train; unfreeze them")
        self._hooks: list[Any] = []
        self._released = False
        for index, parameter in enumerate(self._parameters):
            self._hooks.append(parameter.register_hook(self._arrival(index)))
        if isinstance(inner, Gates):
            inner.listen(self.step, self.release)
        self._state = {"step": 0.0, "integral": -3.0, "task": 0.0, "ratio": 0.0, "weight": 0.0, "skipped": 0.0}
        self._violation: Tensor | None = None
        self._ratio: list[Tensor] = []
        # Per backward pass: scale of the loss, gradient of the penalty, gradient that arrived at every parameter.
        self._arrived: list[tuple[Tensor, Tensor, list[Tensor | None]]] = []
        self._passes = 0

    def release(self) -> None:
        """Let go of the gates; another budget holds them now."""
        self._released = True
        for hook in self._hooks:
            hook.remove()

    def feasible(self) -> bool:
        """Whether some widths of the gates promise no more than the target."""
        return self.least_ms <= self.target_ms * (1 + 1e-6)

    def scheduled_ms(self) -> float:
        """The target at the present step."""
        warmup = self.warmup_fraction * self.steps
        share = min(1.0, self._state["step"] / warmup) if warmup > 0 else 1.0
        start = max(self.dense_ms, self.target_ms)
        return start + share * (self.target_ms - start)

    def expected_ms(self) -> Tensor:
        """Milliseconds at the gates' soft widths, a differentiable scalar."""
        switches = self.model.switches
        soft = {g: gate.soft_width() for g, gate in self.gates.items()}
        return self._latency({g: v if g in switches else _at_most(v, self.model.dense[g]) for g, v in soft.items()})

    def configuration(self) -> dict[str, float]:
        """The gates' decisions as a value for every site of the model, switches included."""
        most = {g: 1 if g in self.model.switches else self.model.dense[g] for g in self.gates}
        values = {g: min(gate.width(), most[g]) for g, gate in self.gates.items()}
        return configured(self.model, values, self._layers)

    def penalty(self) -> Tensor:
        """The scalar to add to the loss. Its gradient reaches the gates' parameters only."""
        if self._released:
            raise SluiceError(
                "this budget's gates have another budget by now, made after it; use that one, or insert gates anew"
            )
        if self._passes > PATIENCE:
            raise SluiceError(f"penalty() was used {self._passes} times without step(); call it after optimizer.step()")
        with torch.enable_grad():
            violation = self.expected_ms() / self.scheduled_ms() - 1.0
            found = torch.autograd.grad(violation, self._parameters, allow_unused=True)
        slope = _flat(found, self._parameters)
        violation = violation.detach()
        pull = self._state["integral"] + PROPORTIONAL * violation.clamp(-1.0, 0.2)
        multiplier = self._unit() * pull.clamp(max=LOG_MOST).exp() * (1.0 + violation / MARGIN).clamp(0.0, 1.0)
        self._violation = violation
        if not torch.is_grad_enabled():
            return multiplier * violation
        self._passes += 1
        self._ratio.append(slope.square().sum())
        sent = multiplier * slope

        def seen(scale: Tensor) -> None:
            self._arrived.append((scale, sent, [None] * len(self._parameters)))

        penalty: Tensor = _Lagrangian.apply(multiplier * violation, sent, seen, *self._parameters)
        return penalty

    def step(self) -> None:
        """Advances target and multiplier; once after every optimizer step.

        Raises:
            SluiceError: the expected latency or the loss's gradient at the gates is not finite.
        """
        self._passes = 0
        violation = math.nan if self._violation is None else float(self._violation)
        if self._violation is None:
            raise SluiceError("step() without penalty(); add budget.penalty() to the loss of every step")
        if not math.isfinite(violation):
            raise SluiceError(
                f"expected latency is {violation} at step {int(self._state['step'])}: a gate's logits are not finite; "
                "lower the gates' learning rate"
            )
        if self._arrived:
            self._measure()
        lo, hi = LOG_RANGE
        moved = self._state["integral"] + self.gain * max(-0.2, min(violation, 0.2))
        self._state["integral"] = min(max(moved, lo), hi)
        self._state["step"] += 1
        self._arrived, self._ratio, self._violation = [], [], None

    def state_dict(self) -> dict[str, float]:
        return {**self._state, "target_ms": self.target_ms, "dense_ms": self.dense_ms}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        for name, value in (("target_ms", self.target_ms), ("dense_ms", self.dense_ms)):
            if not math.isclose(state[name], value, rel_tol=1e-6):
                raise SluiceError(
                    f"the checkpoint's {name} is {state[name]:.4g}, this budget's {value:.4g}; use the same"
                )
        self._state = {name: float(state[name]) for name in self._state}

    def _unit(self) -> float:
        """The multiplier at which loss and latency pull equally hard; zero until a gradient has been seen."""
        task, ratio, weight = self._state["task"], self._state["ratio"], self._state["weight"]
        if weight == 0.0 or ratio == 0.0:
            return 0.0
        # A loss that does not depend on the gates sets no scale; any positive one will do.
        return math.sqrt(task / ratio) if task > 0 else 1.0

    def _measure(self) -> None:
        """Updates the running mean squares of the task's and the ratio's gradient."""
        squares = [
            (_flat(gradients, self._parameters) / scale - sent).square().sum()
            for scale, sent, gradients in self._arrived
        ]
        task, ratio = float(torch.stack(squares).sum()), float(torch.stack(self._ratio).sum())
        scaled = float(self._arrived[-1][0]) != 1.0
        if not (math.isfinite(task) and math.isfinite(ratio)):
            self._state["skipped"] += 1
            if not scaled or self._state["skipped"] > SKIPS:
                raise SluiceError(
                    f"the loss's gradient at the gates is {task} at step {int(self._state['step'])}; the loss is not "
                    "finite: lower the learning rate or clip the gradients"
                )
            return
        self._state["skipped"] = 0.0
        decay = DECAY if self._state["weight"] > 0 else 0.0
        self._state["task"] = decay * self._state["task"] + (1 - decay) * task
        self._state["ratio"] = decay * self._state["ratio"] + (1 - decay) * ratio
        self._state["weight"] = 1.0

    def _arrival(self, index: int) -> Callable[[Tensor], None]:
        def arrived(gradient: Tensor) -> None:
            if self._arrived:
                self._arrived[-1][2][index] = gradient.detach()

        return arrived


def _with_a_place(gates: Gates, profile: Profile | None) -> dict[str, GateLike]:
    """All gates but those of groups that the measured graph does not have: these are held open, as the report says."""
    unmatched = frozenset[str]() if profile is None else profile.space.unmatched
    placed: dict[str, GateLike] = {}
    for site, gate in gates.items():
        if site in unmatched and isinstance(gate, Gate):
            gate.open_all()
            gate.requires_grad_(False)
        else:
            placed[site] = gate
    return placed


def movable(model: LatencyModel, gated: frozenset[str]) -> frozenset[str]:
    """The gated sites, the switches of their forms, and the dense switches of their layers."""
    moving = gated | {site.removesuffix(RANK) for site in gated if site.endswith(RANK)}
    touched = [rule for rule in model.rules if any(s in moving for s, _ in rule.coefs)]
    return frozenset(moving | {s for rule in touched for s, _ in rule.coefs if model.dense[s]})


def _at_most(width: Tensor, most: float) -> Tensor:
    """A width may exceed the dense one, if only by rounding; the gradient passes, so that it is pulled back."""
    return torch.where(width > most, most + (width - width.detach()), width)


def _flat(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    found = zip(gradients, like, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().reshape(-1) for g, p in found])
