"""Our pairs of quantizers against those of ``onnxruntime.quantization``, in ONNX Runtime on one thread of a CPU.

    python -m benchmarks.int8 [--networks resnet20_mnist ...]
    python -m benchmarks.int8 --show

Both calibrate on the same `CALIBRATION` inputs, scale weights by output channel, and write uint8 activations. ONNX
Runtime's tool preprocesses the file as its manual says and takes the plain maximum. Told are the relative error of the
outputs to fp32 on `TESTED` other inputs, the accuracy where the network is trained, and the time of both engines, the
lowest of turns, as a share of fp32's.

Last line: JSON with ``worst_time_ratio, median_time_ratio`` (ours by theirs) and ``better_or_equal``, the number of
networks whose error with our pairs is no more than a tenth above theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks.committed import demand_rows, read_rows, write_rows
from benchmarks.fidelity_runs import NETWORKS
from sluice.artifacts.deploy import deploy_onnx
from sluice.models.mnist import load_digits
from sluice.models.pretrained import resnet20_mnist
from sluice.passes.cut.export import finalize, to_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.profiler.timing.measure import measure
from sluice.runtime.base.compare import relative_error
from sluice.runtime.ort.cpu import OrtRunner

RESULT = Path("benchmarks/results/int8-ort-cpu.json")
TRAINED = "resnet20_mnist"
CHOSEN = (TRAINED, "mobilenet_v2", "se_resnet", "resnet50", "vgg16_bn")
CALIBRATION, TESTED, BATCH = 128, 256, 8
ABOVE = 1.1


def theirs(model: onnx.ModelProto, inputs: np.ndarray) -> onnx.ModelProto:
    """The int8 file of ``onnxruntime.quantization``."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    (name,) = OnnxGraph(model).inputs

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(np.split(inputs, len(inputs) // BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{k}.onnx") for k in range(3)]
        onnx.save(model, paths[0])
        quant_pre_process(paths[0], paths[1])
        quantize_static(
            paths[1], paths[2], Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return onnx.load(paths[2])


def row(name: str) -> dict[str, Any]:
    """The comparison on one network."""
    torch.manual_seed(0)
    labels = None
    network: nn.Module
    if name == TRAINED:
        digits, network = load_digits(), resnet20_mnist().eval()
        calibration, tested = digits.train_x[:CALIBRATION], digits.test_x[:TESTED]
        labels = digits.test_y[:TESTED].numpy()
    else:
        network, shape = NETWORKS[name].make().eval(), NETWORKS[name].shape
        calibration, tested = torch.randn(CALIBRATION, *shape), torch.randn(TESTED, *shape)
    wide = finalize(to_onnx(network, (calibration[:2],)))
    files = {
        "fp32": wide,
        "ours": deploy_onnx(wide, "int8", list(calibration.split(BATCH))),
        "theirs": theirs(wide, calibration.numpy()),
    }
    (given,) = OnnxGraph(wide).inputs
    outputs = {
        key: np.concatenate([next(iter(session.run({given: x.numpy()}).values())) for x in tested.split(BATCH)])
        for key, session in ((key, OrtRunner().build(file)) for key, file in files.items())
    }
    sessions = [OrtRunner().build(file, batch=BATCH) for file in files.values()]
    times = dict(zip(files, measure(sessions, min_bursts=60, rng=np.random.default_rng(0)), strict=True))
    found: dict[str, Any] = {}
    for key in ("ours", "theirs"):
        found[key] = {
            "error": relative_error(outputs[key], outputs["fp32"]),
            "rms_error": float(np.sqrt(np.mean((outputs[key] - outputs["fp32"]) ** 2)) / np.abs(outputs["fp32"]).max()),
            "time": times[key].ms / times["fp32"].ms,
            "quantizers": sum(node.op_type == "QuantizeLinear" for node in files[key].graph.node),
        }
        if labels is not None:
            found[key]["accuracy"] = float((outputs[key].argmax(1) == labels).mean())
    if labels is not None:
        found["accuracy"] = float((outputs["fp32"].argmax(1) == labels).mean())
    return found


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    print("network             error (rms): ours, theirs      time of fp32: ours, theirs    quantizers    accuracy")
    for name, found in rows.items():
        a, b = found["ours"], found["theirs"]
        told = f"{found['accuracy']:.3f} -> {a['accuracy']:.3f}, {b['accuracy']:.3f}" if "accuracy" in found else ""
        print(
            f"{name:20}{a['rms_error']:12.2%} {b['rms_error']:12.2%}   {a['time']:14.2f} {b['time']:10.2f}   "
            f"{a['quantizers']:10} {b['quantizers']:5}    {told}"
        )
    ratios = [found["ours"]["time"] / found["theirs"]["time"] for found in rows.values()]
    fine = sum(found["ours"]["rms_error"] <= ABOVE * found["theirs"]["rms_error"] for found in rows.values())
    last = {"worst_time_ratio": max(ratios), "median_time_ratio": statistics.median(ratios), "better_or_equal": fine}
    print(json.dumps(last))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=CHOSEN, choices=sorted({TRAINED, *NETWORKS}))
    parser.add_argument("--show", action="store_true", help="print the committed result")
    asked = parser.parse_args(arguments)
    rows = read_rows(RESULT)
    if not asked.show:
        for name in asked.networks:
            rows[name] = row(name)
            write_rows(RESULT, {"batch": BATCH, "calibration": CALIBRATION}, rows)
    demand_rows(RESULT, rows)
    show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
