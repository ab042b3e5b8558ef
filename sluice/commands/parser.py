"""The arguments of every verb of the command line; `sluice.cli` carries the verbs out.

A verb is a function: the user types its name, and help prints its docstring. A word that is wrong by itself is wrong
usage (exit status 2); arguments that contradict each other are a `SluiceError` of the verb.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

from sluice.commands import options as options
from sluice.commands.input_options import onnx_inputs
from sluice.commands.table import add_table

__all__ = ["TOLERANCE", "Verb", "make_parser"]

TOLERANCE = 1e-5  # relative, of `sluice check`

Verb = Callable[[argparse.Namespace], int]


def make_parser(verbs: Iterable[Verb]) -> argparse.ArgumentParser:
    """All verbs and their options; the function of a verb's name below adds its options."""
    from sluice.core.version import __version__

    top = argparse.ArgumentParser(
        prog="sluice", description="Makes a network fit a latency budget measured on the device."
    )
    top.add_argument("--version", action="version", version=f"sluice {__version__}")
    made = top.add_subparsers(required=True, metavar="VERB")
    for verb in verbs:
        text = str(verb.__doc__).strip()
        parser = made.add_parser(verb.__name__, help=text, description=text)
        _ARGUMENTS[verb.__name__](parser)
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
        parser.set_defaults(run=verb)
    add_table(made)
    return top


def _inspect(p: argparse.ArgumentParser) -> None:
    options.network(p)
    options.exclude(p)
    p.add_argument("-v", "--verbose", action="store_true", help="name all tensors, however long a line gets")


def _profile(p: argparse.ArgumentParser) -> None:
    options.network(p)
    options.profiling(p)
    options.minutes(p)
    p.set_defaults(wrong=p.error)


def _compress(p: argparse.ArgumentParser) -> None:
    options.network(p)
    options.table(p)
    options.budget(p, drop=True)
    options.minutes(p)
    p.add_argument("--out", required=True, help="folder for plan, weights, ONNX file and report")
    p.add_argument(
        "--gate-epochs", type=options.count, default=0, help="epochs with gates; 0 decides in one shot (default 0)"
    )
    p.add_argument("--epochs", type=options.count, default=10, help="epochs of fine-tuning (default 10)")
    p.add_argument(
        "--rehearsal", type=options.share, default=0.25, metavar="SHARE", help="training in which plans are compared "
        "before one is chosen, as a share of the epochs; 0 takes the solver's word (default 0.25)",
    )  # fmt: skip
    p.add_argument(
        "--gates", action="store_true", help="gates make one more plan of the best one, in a third of the epochs on top"
    )
    p.add_argument(
        "--progressive", action="store_true", help="a network that comes down to a deep budget in stops makes one more "
        "plan, in a third of the epochs on top",
    )  # fmt: skip
    p.add_argument(
        "--rotate",
        action="store_true",
        help="first write attention in a basis that sorts the dimensions of its heads, "
        "which may be cut then; for --epochs 0",
    )
    p.add_argument("--evaluate", metavar="FUNCTION", help="package.module:function from a module to its accuracy")
    options.widths(p)
    p.add_argument(
        "--steps", type=options.count, default=0, metavar="N", help="of an ONNX file: steps of training towards the "
        "file's own outputs, which needs torch (default 0)",
    )  # fmt: skip
    p.add_argument("--seed", type=options.count, help="of all random numbers of the trainings")
    options.loss(p)
    options.recovery(p)
    _full(p)


def _plan(p: argparse.ArgumentParser) -> None:
    options.model(p)
    options.table(p)
    options.budget(p)
    options.loss(p)
    p.add_argument("-o", "--out", required=True, help="the plan to write")


def _apply(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL.onnx", help="the dense ONNX file that the plan was made for")
    p.add_argument("plan", metavar="PLAN.json")
    onnx_inputs(p)
    p.add_argument("-o", "--out", required=True, help="the ONNX file to write")


def _export(p: argparse.ArgumentParser) -> None:
    options.network(p)
    options.precision(p)
    p.add_argument("--plan", metavar="DIR", help="folder that `sluice compress` wrote, or a plan")
    p.add_argument("--opset", type=options.positive, help="of the file (default 20; an ONNX file keeps its own)")
    for side in ("input", "output"):
        p.add_argument(
            f"--{side}-names", type=options.names, default=(), metavar="A,B", help=f"what its {side}s are called, in "
            "order (default: as in forward())",
        )  # fmt: skip
    p.add_argument("--names", action="store_true", help="fold nothing: what `sluice apply` and `sluice profile` take")
    p.add_argument("-o", "--out", required=True, help="the ONNX file to write")
    p.add_argument(
        "--calibration",
        metavar="DATA",
        help="for int8: package.module:factory of some hundred inputs in batches; of an ONNX file, what compress takes "
        "as --data",
    )
    p.add_argument(
        "--exclude", action="append", default=[], metavar="LAYER", help="for int8: layer, or shell pattern of layers, "
        "that stays in fp32",
    )  # fmt: skip
    p.add_argument(
        "--reduce-range", action=argparse.BooleanOptionalAction, help="for int8: weights of 7 bits, which x86 without "
        "VNNI needs (default: as this CPU does)",
    )  # fmt: skip
    # No default here: only a target that the user gives must fit the precision and the engine.
    p.add_argument(
        "--target", help="runtime that the file is for; int8 has another form for each (default ort-cpu, with "
        "--engine tensorrt)",
    )  # fmt: skip
    p.add_argument("--engine", metavar="FILE", help="build an engine with the TensorRT of this machine")
    p.add_argument(
        "--table", help="latency table of this device whose timing cache the engine is built with: it then takes the "
        "kernels that were measured",
    )  # fmt: skip
    p.add_argument(
        "--batch", type=options.positive, default=1, help="batch size of the engine, of commands, and of the file if "
        "the network does not leave it free (default 1)",
    )  # fmt: skip


def _check(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=f"{options.MODEL}, or its dense ONNX file")
    p.add_argument("folder", metavar="DIR", help="folder that `sluice compress` wrote")
    options.weights(p)
    onnx_inputs(p)
    p.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"relative, in fp32 (default {TOLERANCE:g})")


def _report(p: argparse.ArgumentParser) -> None:
    p.add_argument("report", metavar="DIR", help="folder that `sluice compress` wrote, or a report.json")
    _full(p)


def _full(p: argparse.ArgumentParser) -> None:
    p.add_argument("--full", action="store_true", help="print every piece, joint and layer left alone")


def _bench(p: argparse.ArgumentParser) -> None:
    options.device(p)
    p.add_argument(
        "models", nargs="+", metavar="MODEL.onnx", help="ONNX files of that batch, measured in turns; with --target "
        "tensorrt also engines (.engine, .plan, .trt), which have a batch of their own",
    )  # fmt: skip


def _serve(p: argparse.ArgumentParser) -> None:
    from sluice.core.address import PORT

    options.target(p)
    options.threads(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)")
    p.add_argument(
        "--port", type=options.count, default=PORT, help=f"0 for any that is free (default {PORT}); it is printed"
    )
    p.add_argument(
        "--token-file", metavar="FILE", help="holds what clients must have in their SLUICE_TOKEN; by default this "
        "machine's own SLUICE_TOKEN, without which only this machine is served",
    )  # fmt: skip


def _models(p: argparse.ArgumentParser) -> None:
    """Nothing is chosen."""


_ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "inspect": _inspect,
    "profile": _profile,
    "compress": _compress,
    "plan": _plan,
    "apply": _apply,
    "export": _export,
    "check": _check,
    "report": _report,
    "bench": _bench,
    "serve": _serve,
    "models": _models,
}
