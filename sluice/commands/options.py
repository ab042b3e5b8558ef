"""Options that several verbs of the command line share, and the types of their values.

The error of a type says how a word is wrong and what to write instead; `argparse` adds the name of the option.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sluice.commands.input_options import fix, named_inputs, shape, whole

if TYPE_CHECKING:
    from sluice.profiler.sweep.shards import Shard
    from sluice.training.recovery import Recovery

__all__ = [
    "METHODS",
    "MODEL",
    "budget",
    "budget_of",
    "count",
    "device",
    "exclude",
    "loss",
    "minutes",
    "model",
    "network",
    "positive",
    "precision",
    "profiling",
    "recovery",
    "recovery_settings",
    "settings",
    "shard",
    "table",
    "target",
    "threads",
    "weights",
]

METHODS = "filter,rank,block,merge"
MODEL = (
    "package.module:factory, with arguments as factory?width=8&deep=True, sluice:NAME for a network of sluice.models, "
    "or timm:NAME, torchvision:NAME, hf:CONFIG, diffusers:CLASS, ultralytics:NAME of those packages"
)


def model(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--shape", type=shape, help="shape of the input without the batch: 3,32,32")
    _inputs(p)


def network(p: argparse.ArgumentParser) -> None:
    """A model, or its ONNX file, for verbs that need no weights to train."""
    p.add_argument(
        "model", metavar="MODEL", help=f"{MODEL}; or an ONNX file in fp32",
    )  # fmt: skip
    p.add_argument(
        "--shape", type=shape, help="shape of the input without the batch: 3,32,32; an ONNX file has its own"
    )
    _inputs(p)
    fix(p)


def _inputs(p: argparse.ArgumentParser) -> None:
    named_inputs(p)
    weights(p)


def weights(p: argparse.ArgumentParser) -> None:
    p.add_argument("--weights", metavar="FILE.safetensors", help="tensors of MODEL, by the names of its state_dict")


def exclude(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--exclude", action="append", default=[], help="layer, shell pattern of layers, or type:LayerNorm, to leave "
        "alone",
    )  # fmt: skip


def widths(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--keep", action="append", default=[], type=kept, metavar="LAYER=0.5", help="least share, or number, of the "
        "channels of a layer or shell pattern",
    )  # fmt: skip
    p.add_argument(
        "--multiple", action="append", default=[], type=multiple_of, metavar="LAYER=8", help="what the widths of a "
        "layer or shell pattern are multiples of",
    )  # fmt: skip


def kept(text: str) -> tuple[str, float]:
    """``LAYER=0.5`` or ``LAYER=16``."""
    pattern, _, value = text.rpartition("=")
    try:
        return pattern or "*", int(value) if value.isdecimal() else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} says not how much is kept; give LAYER=0.5 or LAYER=16") from None


def multiple_of(text: str) -> tuple[str, int]:
    """``LAYER=8``, or ``8`` for all layers."""
    pattern, _, value = text.rpartition("=")
    return pattern or "*", positive(value)


def device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--batch", type=positive, default=1, help="batch size of the deployment (default 1)")
    threads(p)
    target(p, "; TARGET@HOST:PORT where `sluice serve` runs")


def threads(p: argparse.ArgumentParser) -> None:
    p.add_argument("--threads", type=positive, default=1, help="threads inside an operator (default 1)")


def target(p: argparse.ArgumentParser, elsewhere: str = "") -> None:
    p.add_argument(
        "--target",
        default="ort-cpu",
        help=f"ort-cpu, openvino, ort-cuda, torch-cuda or tensorrt (default ort-cpu){elsewhere}",
    )


def precision(p: argparse.ArgumentParser) -> None:
    p.add_argument("--precision", default="fp32", help="of the deployment: fp32, fp16, bf16 or int8 (default fp32)")


def table(p: argparse.ArgumentParser) -> None:
    p.add_argument("--table", required=True, help="latency table, made or continued")
    _profiled(p)


def profiling(p: argparse.ArgumentParser) -> None:
    p.add_argument("--table", help="latency table, made or continued; with --pack, what is known already")
    _profiled(p)
    p.add_argument(
        "--shard", type=shard, metavar="K/N", help="measure the share of one of N devices or hosts of one kind"
    )
    p.add_argument(
        "--complete", action="store_true", help="measure all points now, for a table that serves where the device is "
        "not at hand; else what a plan needs is measured when it is asked for",
    )  # fmt: skip
    p.add_argument("--pack", action="store_true", help="measure nothing, write a job for a device without torch")
    p.add_argument("-o", "--out", metavar="JOB.zip", help="with --pack, the job to write")
    p.add_argument(
        "--layers", action="store_true", help="tell which layers of the dense engine hold which piece (tensorrt)"
    )


def _profiled(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--methods",
        default=METHODS,
        metavar="LIST",
        help=f"what may be done to the network, of {METHODS} (default: all), or bsr alone",
    )
    device(p)
    precision(p)
    exclude(p)
    p.add_argument(
        "--in-process", action="store_true", help="run the runtime in this process, not in one of its own whose crash "
        "or hang costs one point: for networks above 2 GiB",
    )  # fmt: skip
    p.add_argument("--quiet", action="store_true", help="no progress bars")


def budget(p: argparse.ArgumentParser, drop: bool = False) -> None:
    """The budget; where a ``drop`` may take its place, also what the figure of merit may lose."""
    asked = p.add_mutually_exclusive_group(required=True)
    asked.add_argument("--budget", help="share of the dense latency, 50%%, or 2.4ms")
    if drop:
        asked.add_argument(
            "--max-drop", type=amount, metavar="X", help="in place of a budget: the least latency at which what "
            "--evaluate gives is at most X below the dense network's",
        )  # fmt: skip
    p.add_argument(
        "--data", required=True, help="package.module:factory of batches (inputs, labels); of an ONNX file, examples "
        "in an .npz file, a folder of .npy files, a factory of a mapping from inputs to arrays, or random",
    )  # fmt: skip


def loss(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--loss", metavar="LOSS", help="cross-entropy (of outputs (N, classes, ...), per position), bce, mse, cosine, "
        "logits (distillation along the last axis), or package.module:function of (outputs, teacher's outputs, labels) "
        "or (outputs, labels); default: for logits of classes (N, classes)",
    )  # fmt: skip


def recovery(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--lr", type=rate, default="auto", metavar="auto|NUMBER", help="learning rate of the weights; auto finds it by "
        "short runs before the fine-tune (default auto)",
    )  # fmt: skip
    p.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="of the fine-tune (default adamw)")
    p.add_argument("--weight-decay", type=float, default=1e-2, metavar="X", help="of the fine-tune (default 0.01)")
    p.add_argument(
        "--warmup", type=float, default=0.05, metavar="SHARE", help="share of the steps of the fine-tune in which the "
        "rate rises (default 0.05)",
    )  # fmt: skip
    p.add_argument(
        "--compensate", action=argparse.BooleanOptionalAction, default=None, help="refit the weights by least squares "
        "after the cut (default: where there is no fine-tune)",
    )  # fmt: skip


def budget_of(args: argparse.Namespace) -> str:
    """What the options of `budget` say, as the argument of `sluice.compress`."""
    return args.budget if args.max_drop is None else repr(-args.max_drop)


def recovery_settings(args: argparse.Namespace) -> Recovery:
    """What the options of `recovery` say."""
    from sluice.training.recovery import Recovery

    return Recovery(args.lr, args.optimizer, args.weight_decay, args.warmup, compensate=args.compensate)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of a table, a device and a profile say, as arguments of a profile."""
    from sluice.commands.place import place
    from sluice.core.deployment import Deployment
    from sluice.solver.options import check_methods

    found = {
        "table": args.table,
        "deployment": Deployment(place(args), args.batch, args.threads, args.precision),
        "exclude": args.exclude,
        "methods": check_methods(args.methods.split(",")),
        "progress": not args.quiet,
    }
    return {**found, "minutes": args.minutes} if getattr(args, "minutes", None) else found


def rate(text: str) -> float | str:
    """``auto`` or a number above 0."""
    try:
        return text if text == "auto" else _above_zero(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no learning rate; give a positive number, or auto") from None


def share(text: str) -> float:
    """A number from 0 to 10."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of the epochs; give a number from 0 to 10")
    return value


def amount(text: str) -> float:
    """A number of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no drop of a figure of merit; give a number of 0 or more")
    return value


def _above_zero(value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(value)
    return value


def shard(text: str) -> Shard:
    """``2/8``."""
    from sluice.profiler.sweep.shards import shard_argument

    return shard_argument(text)


def minutes(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--minutes", type=positive, metavar="N", help="measure no more after N minutes; the rest is estimated, and told"
    )


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    return _at_least(1, text)


def names(text: str) -> tuple[str, ...]:
    """Names, with commas between them."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; give names with commas between them")
    return found


def count(text: str) -> int:
    """A whole number of 0 or more."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if (value := whole(text)) is None or value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is too small or no whole number; give one of {least} or more")
    return value
