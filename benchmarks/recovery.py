"""What a learning rate that is found by trial is worth: fine-tunes of equal length, its trial counted.

    python -m benchmarks.recovery [--seeds 0 1] [--epochs 12]

A small network is trained on 2,000 MNIST digits of 14 x 14 pixels, and cut by magnitude to a deep and to a light cut,
the same plan for every run. Each fine-tune takes the digits ``--epochs`` times in all: at a rate of 1e-3, as it was
before; with the setting that the trial finds, whose steps shorten its fine-tune; and at every rate of the grid, of
which the best is the oracle. Accuracy is on 1,000 other digits, one of which is 0.1 points: differences below 0.5 are
noise.

Last line: JSON, by cut the accuracies in percent of every seed, ``auto`` with the setting that was chosen, ``dense``
that of the network before the cut and ``cut`` right after it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from sluice.core.plan import Plan
from sluice.models.mnist import Digits, accuracy, load_digits, train
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_captured
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.training.dense_parametrisation import merge_dense, widened
from sluice.training.recovery import RATES, Recovery
from sluice.training.train import default_loss, fit
from sluice.training.trial import SHARE, losses_for, try_settings

BATCH = 25
BEFORE = 1e-3  # the rate that was the default
CUTS = {"deep": 0.2, "light": 0.8}  # share of every layer's channels that is kept


def network() -> nn.Module:
    """(N, 1, 14, 14) to (N, 10): four convolutions, one of them depthwise."""
    widths = [(1, 16, 1, 2), (16, 32, 1, 2), (32, 32, 32, 1), (32, 48, 1, 1)]
    layers: list[nn.Module] = []
    for before, after, groups, stride in widths:
        conv = nn.Conv2d(before, after, 3, stride, 1, groups=groups, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def small_digits(seed: int) -> Digits:
    """Every second of the training digits, and all at half the side."""
    full = load_digits(seed)
    train_x, test_x = (nn.functional.avg_pool2d(x, 2) for x in (full.train_x[::2], full.test_x))
    return Digits(train_x, full.train_y[::2], test_x, full.test_y)


def plan_of(dense: fx.GraphModule, share: float) -> Plan:
    """Of every group the channels whose producing weights have the largest norm."""
    analysis, state, kept = analyze(dense), dense.state_dict(), {}
    for group in analysis.groups:
        score = torch.zeros(group.size)
        for ref in group.refs:
            if ref.axis == 0 and state[ref.param].ndim > 1:
                own = state[ref.param].flatten(1).square().sum(1)
                mine = torch.from_numpy(ref.channels >= 0)
                score.index_add_(0, torch.from_numpy(ref.channels)[mine], own[mine])
        count = max(1, round(share * group.size))
        kept[group.name] = sorted(score.argsort(descending=True)[:count].tolist())
    return make_plan(analysis, kept)


@dataclass(frozen=True)
class Shuffled:
    """The digits in another order every time, as a loader gives them."""

    digits: Digits
    generator: torch.Generator
    batch: int = BATCH

    def __len__(self) -> int:
        return len(self.digits.train_x) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.digits.train_x), generator=self.generator)
        for chosen in order.split(self.batch):
            yield self.digits.train_x[chosen], self.digits.train_y[chosen]


def one(cut: str, seed: int, epochs: int, digits: Digits, dense: fx.GraphModule) -> dict[str, Any]:
    """All fine-tunes of one cut."""
    plan = plan_of(dense, CUTS[cut])
    slim = clone(dense)
    rewrite_captured(slim, plan)

    def data() -> Shuffled:
        return Shuffled(digits, torch.Generator().manual_seed(100 + seed))

    def judged(module: nn.Module) -> float:
        return accuracy(module, digits.test_x, digits.test_y)

    def tuned(module: fx.GraphModule, lr: float, length: int, loss: Any = default_loss) -> fx.GraphModule:
        fit(module, data(), epochs=length, teacher=dense, loss=loss, recovery=Recovery(lr), progress=False)
        return module

    found: dict[str, Any] = {"dense": judged(dense), "cut": judged(clone(slim))}
    found["rates"] = {f"{lr:g}": judged(tuned(clone(slim), lr, epochs)) for lr in RATES["adamw"]}
    found["before"] = found["rates"][f"{BEFORE:g}"]
    found["oracle"] = max(found["rates"].values())
    length = math.floor(epochs / (1 + SHARE))
    widen = partial(widened, slim, dense, plan)
    trial = try_settings(slim, data(), teacher=dense, recovery=Recovery(), epochs=length, widen=widen, progress=False)
    chosen = trial.chosen
    wide = widen() if chosen.dense else clone(slim)
    tuned(wide, chosen.lr, length, losses_for(default_loss, True)[chosen.loss])
    if chosen.dense:
        merge_dense(wide, slim)
    found["auto"] = judged(slim if chosen.dense else wide)
    found["setting"] = asdict(chosen)
    found["epochs"] = {"fine-tune": length, "trial": trial.steps / len(data())}
    found["runs"] = [[*asdict(run.setting).values(), run.steps, run.held_out] for run in trial.runs]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args(argv)
    found: dict[str, list[dict[str, Any]]] = {cut: [] for cut in CUTS}
    for seed in options.seeds:
        torch.manual_seed(seed)
        digits = small_digits(seed)
        model = train(network(), digits, epochs=20, lr=3e-3, batch=BATCH, seed=seed, augment=False, progress=False)
        dense = capture(model.eval(), digits.train_x[:2])
        for cut in CUTS:
            got = one(cut, seed, options.epochs, digits, dense)
            found[cut].append(got)
            print(f"seed {seed}, {cut}: {json.dumps(got)}", file=sys.stderr)
    for cut, runs in found.items():
        for name in ("dense", "cut", "before", "auto", "oracle"):
            print(f"{cut:6} {name:7}", *(f"{run[name]:6.1f}" for run in runs))
    print(json.dumps({"epochs": options.epochs, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
