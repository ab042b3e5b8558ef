from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.artifacts.deploy import as_module
from sluice.core.errors import SluiceError
from sluice.passes.precision.to_precision import to_precision
from sluice.runtime.base import host
from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.denormals import FLUSH_BITS
from sluice.runtime.openvino import runner as module
from sluice.runtime.openvino.part import products_in
from sluice.runtime.openvino.runner import OpenVinoRunner, OpenVinoSession
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.ort.saturation import sums_saturate
from tests.exported import deployed, random_feeds
from tests.networks import NETWORKS

ABILITIES = module._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
BF16_TOLERANCE = 10 * 2.0**-7


def linear(batch: int | str | None = "n", features: int | str = 5) -> onnx.ModelProto:
    """y = relu(x @ w), x of shape (batch, features), w of shape (5, 3)."""
    weight = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Relu", ["z"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def scaled(factor: float, channels: int = 1, size: int = 3) -> onnx.ModelProto:
    """y = factor * x, by a convolution over x of shape (1, channels, size, size)."""
    weight = (np.eye(channels) * factor).astype(np.float32).reshape(channels, channels, 1, 1)
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, channels, size, size]) for n in "xy"]
    nodes, weights = [helper.make_node("Conv", ["x", "w"], ["y"])], [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph(nodes, "scaled", infos[:1], infos[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def identity(kind: int) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, kind, [3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", infos[:1], infos[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_what_onnx_runtime_computes(name: str) -> None:
    """Odd sizes, one to three spatial axes, several inputs; with the batch free and fixed."""
    model = deployed(name)
    for batch in (3, 1):
        feeds = random_feeds(model, batch)
        wanted = OrtRunner().build(model).run(feeds)
        assert_close(OpenVinoRunner().build(model).run(feeds), wanted, 5e-5)
        assert_close(OpenVinoRunner(1).build(model, batch=batch).run(feeds), wanted, 5e-5)


def test_runs_a_proto_its_bytes_and_a_file(tmp_path: Path) -> None:
    model = linear()
    path = tmp_path / "linear.onnx"
    onnx.save(model, path)
    x = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)
    reference = {"y": np.maximum(x @ numpy_helper.to_array(model.graph.initializer[0]), 0)}
    for source in (model, model.SerializeToString(), path, str(path)):
        assert_close(OpenVinoRunner().build(source).run({"x": x}), reference)
        assert_close(OpenVinoRunner().build(source, batch=7).run({"x": x}), reference)


def test_one_engine_takes_every_batch() -> None:
    session, model = OpenVinoRunner().build(linear()), linear()
    for batch in (2, 5, 1):
        feeds = random_feeds(model, batch)
        assert_close(session.run(feeds), OrtRunner().build(model).run(feeds))


def test_what_was_run_is_not_overwritten_and_timing_leaves_it_alone() -> None:
    session = OpenVinoRunner().build(linear(), batch=2)
    feeds = random_feeds(linear(), 2)
    first = session.run(feeds)
    kept = {name: value.copy() for name, value in first.items()}
    session.run({"x": -feeds["x"]})
    session.sample(2)
    assert_close(first, kept, 0.0)
    assert_close(session.run(feeds), kept, 0.0)


def test_batch_makes_the_shape_static() -> None:
    session = OpenVinoRunner().build(linear(), batch=4)
    with pytest.raises(SluiceError, match=r"'x' of float32 \[3, 5\]; the model takes x: float32 \[4, 5\]$"):
        session.run({"x": np.ones((3, 5), np.float32)})
    assert session.run({"x": np.ones((4, 5), np.float32)})["y"].shape == (4, 3)


def test_sample_needs_static_shapes() -> None:
    with pytest.raises(SluiceError, match=r"input 'x' has dynamic shape \['n', 5\]"):
        OpenVinoRunner().build(linear()).sample(1)
    for session in (
        OpenVinoRunner().build(linear(), batch=4),
        OpenVinoRunner().build(linear(None), batch=4),
        OpenVinoRunner().build(linear(4)),
        OpenVinoRunner().build(linear("n", "f"), feeds_shapes={"x": (4, 5)}),
    ):
        assert session.sample(2) > 0


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL])
def test_sample_makes_up_inputs_of_every_kind(kind: int) -> None:
    assert OpenVinoRunner().build(identity(kind)).sample(3) > 0


def test_sample_refuses_what_it_cannot_make_up() -> None:
    with pytest.raises(SluiceError, match=r"^cannot time the model in memory: input 'x' holds text; give it numbers$"):
        OpenVinoRunner().build(identity(TensorProto.STRING)).sample(1)


@pytest.mark.parametrize("batch", [None, 2])
def test_a_file_that_does_not_load_is_named(tmp_path: Path, batch: int | None) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model at all")
    with pytest.raises(SluiceError, match=r"^cannot load .*broken\.onnx: .*; check that it is an ONNX file$"):
        OpenVinoRunner().build(broken, batch=batch)
    with pytest.raises(SluiceError, match=r"^cannot load .*missing\.onnx: .*; check that it is an ONNX file$"):
        OpenVinoRunner().build(tmp_path / "missing.onnx", batch=batch)


def test_a_graph_that_does_not_load_gives_the_reason() -> None:
    model = linear()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(SluiceError, match=r"^OpenVINO cannot load the model in memory: .*NoSuchOperator.*") as caught:
        OpenVinoRunner().build(model)
    assert "\n" not in str(caught.value) and "Exception from" not in str(caught.value)


def test_feeds_must_match() -> None:
    session = OpenVinoRunner().build(linear())
    for feeds in ({}, {"q": np.ones((2, 5), np.float32)}, {"x": np.ones((2, 5), np.float64)}):
        with pytest.raises(SluiceError, match=r"^cannot run the model in memory with .*; the model takes x: float32"):
            session.run(feeds)


def test_settings_are_checked() -> None:
    with pytest.raises(SluiceError, match="threads=0"):
        OpenVinoRunner(0)
    many = 1000 * (os.cpu_count() or 1)
    with pytest.raises(SluiceError, match=f"^OpenVINO cannot run with threads={many} here; give [0-9]+ or less$"):
        OpenVinoRunner(many).build(linear())


def test_the_clock_follows_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OpenVinoRunner(2).clock == "wall"
    assert OpenVinoRunner(1).build(linear(), batch=2).clock == OpenVinoRunner(1).clock
    # A system whose CPU-time clock ticks coarsely is timed by the wall.
    monkeypatch.setattr(host, "MAX_CLOCK_RESOLUTION_S", 0.0)
    assert OpenVinoRunner(1).clock == "wall"


def test_device_and_version_are_told() -> None:
    import openvino

    assert OpenVinoRunner().device == OrtRunner().device
    assert openvino.__version__.split("-")[0] in OpenVinoRunner().version


def busy(session: OpenVinoSession, *, wait: bool) -> float:
    """The share of the process's CPU time over 30 inferences that the calling thread takes."""
    session.sample(1)
    request = session._timed
    own, whole = time.thread_time(), time.process_time()
    for _ in range(30):
        if wait:
            request.infer(share_outputs=True)
        else:
            request.start_async()
            request.wait()
    return (time.thread_time() - own) / (time.process_time() - whole)


@pytest.mark.skipif(OpenVinoRunner(1).clock != "thread_cpu", reason="the clock is too coarse here")
def test_one_thread_computes_in_the_thread_that_calls() -> None:
    """The premise of timing the calling thread alone; an asynchronous inference shows that the check can fail."""
    session = OpenVinoRunner(1).build(scaled(1.0, channels=64, size=96))
    assert busy(session, wait=True) > 0.9
    assert busy(session, wait=False) < 0.5


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no control over cores")
def test_the_caller_stays_on_its_cores() -> None:
    before = os.sched_getaffinity(0)
    OpenVinoRunner(1).build(linear(), batch=2).sample(2)
    assert os.sched_getaffinity(0) == before


def subnormal() -> bool:
    """Whether the calling thread still computes with subnormal numbers."""
    return bool(np.float32(1e-30) * np.float32(1e-10) > 0)


@pytest.mark.skipif(
    (sys.platform, platform.machine()) not in FLUSH_BITS, reason="no control over the floating-point mode"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_subnormals_are_flushed_in_engines_alone(threads: int) -> None:
    if threads > (os.cpu_count() or 1):
        pytest.skip("fewer cores")
    assert subnormal()
    session = OpenVinoRunner(threads).build(scaled(1e-10, channels=16, size=64))
    assert subnormal()
    x = np.full((1, 16, 64, 64), 1e-30, np.float32)
    assert not session.run({"x": x})["y"].any()
    assert session.run({"x": x * np.float32(1e20)})["y"].all()
    assert subnormal()
    session.sample(2)
    assert subnormal() and not session.run({"x": x})["y"].any()


def test_fp32_is_not_taken_in_sixteen_bits() -> None:
    """By itself OpenVINO would, on CPUs that have bf16."""
    assert products_in(OpenVinoRunner().build(deployed("plain"), batch=3)._engine) == {"f32"}


@pytest.mark.skipif("BF16" not in ABILITIES, reason="this CPU has no products in bf16")
@pytest.mark.parametrize("name", ["plain", "concat", "volume"])
def test_bf16_is_computed_as_it_is_typed(name: str) -> None:
    import torch

    model = to_precision(deployed(name), "bf16", target="openvino")
    session, feeds = OpenVinoRunner().build(model, batch=3), random_feeds(model)
    assert "bf16" in products_in(session._engine)
    wanted = as_module(model)(*(torch.from_numpy(x) for x in feeds.values()))
    found = session.run(feeds)
    assert_close(list(found.values()), [y.numpy() for y in (wanted if isinstance(wanted, tuple) else (wanted,))],
                 BF16_TOLERANCE)  # fmt: skip


@pytest.mark.parametrize(("precision", "ability", "kind"), [("bf16", "BF16", "bfloat16"), ("fp16", "FP16", "float16")])
def test_a_type_that_the_cpu_lacks_is_refused(
    precision: str, ability: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._core()

    class Without:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def get_property(self, device: str, name: str) -> list[str]:
            return [known for known in real.get_property(device, name) if known != ability]

    monkeypatch.setattr(module, "_core", Without)
    model = to_precision(deployed("plain"), precision, target="openvino")
    reason = f"^the model in memory is in {kind}, in which OpenVINO takes no products on this CPU; choose .*$"
    for build in (OpenVinoRunner().build, OpenVinoRunner().build_part):
        with pytest.raises(SluiceError, match=reason):
            build(onnx.shape_inference.infer_shapes(at_three(model)))


def at_three(model: onnx.ModelProto) -> onnx.ModelProto:
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 3
    return model


@pytest.mark.parametrize("name", ["plain", "norms", "grouped"])
def test_int8_is_computed_in_integers(name: str) -> None:
    dense = deployed(name)
    feeds = random_feeds(dense)
    ranges = {info: 3.0 for info in tensors(dense)}
    model = to_precision(dense, "int8", target="openvino", ranges=ranges, reduce_range=sums_saturate())
    session = OpenVinoRunner().build(model, batch=3)
    assert products_in(session._engine) & {"u8", "i8"}
    # Both round to steps of 1/255; where a sum lies between two, they may differ by one.
    assert_close(session.run(feeds), OrtRunner(as_written=True).build(model).run(feeds), 0.03)


def tensors(dense: onnx.ModelProto) -> tuple[str, ...]:
    from sluice.passes.precision.quantize import tensors_to_calibrate

    return tensors_to_calibrate(dense, target="openvino")


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.missing() == ""
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert module.missing() == "OpenVINO is not installed; install it with 'pip install openvino'"
    monkeypatch.undo()

    def broken() -> object:
        raise RuntimeError("no plugins.xml\nat all")

    monkeypatch.setattr(module, "_core", broken)
    assert module.missing() == "the installed OpenVINO cannot be used (no plugins.xml); install it anew"


@pytest.mark.parametrize("timed", [True, False])
def test_inputs_live_as_long_as_the_requests_that_read_them(timed: bool) -> None:
    """OpenVINO reads the array's memory and does not keep it; a large array that is gone is memory unmapped."""
    session = OpenVinoRunner().build(scaled(3.0, 8, 200))
    if timed:
        session.sample(1)
    else:
        x = np.random.default_rng(0).standard_normal((1, 8, 200, 200)).astype(np.float32)
        session.run({"x": x[:, ::-1]})  # a view, of which the session makes a copy of its own
    request = session._timed if timed else session._request
    held = [value for (owner, name), value in session._held.items() if owner == id(request)]
    assert len(held) == 1 and np.shares_memory(request.get_tensor("x").data, held[0])
