"""How fast a network is read and cut, beside Torch-Pruning 1.6.1 (Fang et al., CVPR 2023), in CPU seconds.

    python -m benchmarks.analysis [--networks torchvision:resnet18 ...] [--show]

1. Ours: the captured graph is analysed, a plan keeps half of every group, the torch network is cut. Theirs: the
   dependency graph is built, half of every group is pruned by random numbers. No scores are computed, and the copies
   that each cuts, and our capture, are made before the clock starts. Theirs traces the network in a forward pass of its
   own, which belongs to its graph.
2. Both cut the same network in turns, `ROUNDS` times each, after a turn that does not count; a row has the median of
   the ratios of the turns. A network that one of the two cannot cut, or whose cut network does not run, is an error.
3. `SIZES` are analysed alone: networks of usual size.

Last line: JSON with ``least, median`` of how many times faster, ``networks``, and the seconds of `SIZES`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from benchmarks.methods_pruning import torch_pruning
from sluice.commands.specs import inputs_of, model_of
from sluice.core.errors import SluiceError
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_captured
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import Inputs, capture, clone

__all__ = ["compare", "main"]

T = TypeVar("T")
RESULT = Path(__file__).parent / "results" / "analysis.json"
ROUNDS = 3
IMAGE = (3, 64, 64)
NETWORKS = (
    "torchvision:resnet18", "torchvision:resnet50", "torchvision:resnext50_32x4d", "torchvision:vgg11_bn",
    "torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small", "torchvision:densenet121",
    "torchvision:efficientnet_b0", "torchvision:regnet_y_400mf", "torchvision:squeezenet1_1",
)  # fmt: skip
SIZES = {"bert_base": "hf:BertConfig?architecture=BertForSequenceClassification", "vit_s": "timm:vit_small_patch16_224"}
TOKENS = 128


def ours(dense: fx.GraphModule) -> nn.Module:
    """The slim network, in place."""
    analysis = analyze(dense)
    kept = {group.name: list(range(-(-group.size // 2))) for group in analysis.groups}
    rewrite_captured(dense, make_plan(analysis, kept), analysis=analysis)
    return dense


def theirs(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The same of Torch-Pruning, in place.

    Raises:
        SluiceError: Torch-Pruning is not installed.
    """
    tp = torch_pruning()
    last = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1:]
    pruner = tp.pruner.BasePruner(
        model, inputs, tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=last
    )
    pruner.step()
    return model


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds, and what the work gives."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def compare(name: str, model: nn.Module, inputs: tuple[Tensor, ...], rounds: int = ROUNDS) -> dict[str, Any]:
    """A row: seconds of both, how many times faster ours is, and the share of the parameters that each leaves.

    Raises:
        SluiceError: one of the two cannot cut the network.
    """
    model.eval()
    dense = capture(model, inputs, trained=False).eval()
    total = sum(p.numel() for p in model.parameters())
    seconds: list[tuple[float, float]] = []
    shares: dict[str, float] = {}
    for turn in range(rounds + 1):
        plain, copied = copy.deepcopy(model), clone(dense)
        spent = []
        for whose, work in (("sluice", partial(ours, copied)), ("Torch-Pruning", partial(theirs, plain, inputs))):
            took, slim = timed(work)
            spent.append(took)
            with torch.no_grad():
                slim.eval()(*inputs)
            shares[whose] = sum(p.numel() for p in slim.parameters()) / total
        if turn:
            seconds.append((spent[0], spent[1]))
    for whose, share in shares.items():
        if not share < 1.0:
            raise SluiceError(f"{name}: the cut by {whose} removes nothing; leave it out of --networks")
    return {
        "network": name,
        "faster": round(median(b / a for a, b in seconds), 2),
        "ours_s": round(median(a for a, _ in seconds), 3),
        "theirs_s": round(median(b for _, b in seconds), 3),
        "left": {whose: round(share, 3) for whose, share in shares.items()},
    }


def analysed(spec: str) -> float:
    """CPU seconds that the analysis of a network takes, the median of some."""
    inputs = inputs_of(spec, (TOKENS,) if spec.startswith("hf:") else None, 2)
    dense = capture(model_of(spec).eval(), inputs, trained=False)
    return round(median(timed(partial(analyze, dense))[0] for _ in range(ROUNDS)), 3)


def summary(rows: Sequence[dict[str, Any]], sizes: dict[str, float]) -> dict[str, Any]:
    faster = [float(row["faster"]) for row in rows]
    return {"networks": len(rows), "least": min(faster), "median": round(median(faster), 2), **sizes}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--show", action="store_true", help="print the committed result")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = json.loads(RESULT.read_text()) if options.show else {"rows": [], "sizes": {}}
    rows, sizes = known["rows"], known["sizes"]
    if not options.show:
        warnings.simplefilter("ignore")
        for spec in options.networks:
            given = inputs_of(spec, IMAGE, 2)
            assert isinstance(given, (Tensor, tuple))
            rows.append(compare(spec, model_of(spec), (given,) if isinstance(given, Tensor) else given))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        sizes = {name: analysed(spec) for name, spec in SIZES.items()}
        if options.networks == list(NETWORKS):
            RESULT.write_text(json.dumps({"rows": rows, "sizes": sizes}, indent=1) + "\n")
    for row in rows:
        print(f"{row['network']:<32} {row['faster']:6.2f} times, {row['ours_s']} s against {row['theirs_s']} s")
    print(json.dumps(summary(rows, sizes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
