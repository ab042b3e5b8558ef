"""Options that several verbs of the command line share."""

from __future__ import annotations

import argparse

__all__ = ["budget", "device", "exclude", "model", "precision", "profiling", "table"]

METHODS = "filter,rank,block,merge"
MODEL = "package.module:factory, or sluice:NAME for a network of sluice.models"


def model(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--shape", type=_shape, help="shape of the input without the batch: 3,32,32")


def exclude(p: argparse.ArgumentParser) -> None:
    p.add_argument("--exclude", action="append", default=[], help="layer, or shell pattern of layers, to leave alone")


def device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--batch", type=_positive, default=1, help="batch size of the deployment (default 1)")
    p.add_argument("--threads", type=_positive, default=1, help="threads inside an operator (default 1)")
    p.add_argument("--target", default="ort-cpu", help="ort-cpu, ort-cuda, torch-cuda or tensorrt (default ort-cpu)")


def precision(p: argparse.ArgumentParser) -> None:
    p.add_argument("--precision", default="fp32", help="of the deployment: fp32, fp16, bf16 or int8 (default fp32)")


def table(p: argparse.ArgumentParser) -> None:
    p.add_argument("--table", required=True, help="latency table, made or continued")
    _profiled(p)


def profiling(p: argparse.ArgumentParser) -> None:
    p.add_argument("--table", help="latency table, made or continued; with --pack, what is known already")
    _profiled(p)
    p.add_argument("--shard", metavar="K/N", help="measure the share of one of N devices or hosts of one kind")
    p.add_argument("--pack", action="store_true", help="measure nothing, write a job for a device without torch")
    p.add_argument("-o", "--out", metavar="JOB.zip", help="with --pack, the job to write")


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
    p.add_argument("--quiet", action="store_true", help="no progress bars")


def budget(p: argparse.ArgumentParser) -> None:
    p.add_argument("--budget", required=True, help="share of the dense latency, 50%%, or 2.4ms")
    p.add_argument("--data", required=True, help="package.module:factory of batches (inputs, labels)")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value
