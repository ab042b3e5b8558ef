from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.runtime.base import host
from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.denormals import FLUSH_BITS
from sluice.runtime.ort import cpu as ort_module
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.targets import untimed_runner


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


def to_precision(kind: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "to_precision",
        [helper.make_tensor_value_info("x", kind, [3])],
        [helper.make_tensor_value_info("y", kind, [3])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_runs_a_proto_its_bytes_and_a_file(tmp_path: Path) -> None:
    model = linear()
    path = tmp_path / "linear.onnx"
    onnx.save(model, path)
    x = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)
    reference = {"y": np.maximum(x @ numpy_helper.to_array(model.graph.initializer[0]), 0)}
    for source in (model, model.SerializeToString(), path, str(path)):
        assert_close(OrtRunner().build(source).run({"x": x}), reference)
        assert_close(OrtRunner().build(source, batch=7).run({"x": x}), reference)


def test_batch_makes_the_shape_static() -> None:
    session = OrtRunner().build(linear(), batch=4)
    with pytest.raises(SluiceError, match=r"\(3, 5\).*x: tensor\(float\)"):
        session.run({"x": np.ones((3, 5), np.float32)})
    assert session.run({"x": np.ones((4, 5), np.float32)})["y"].shape == (4, 3)


def test_sample_needs_static_shapes() -> None:
    with pytest.raises(SluiceError, match=r"input 'x' has dynamic shape \['n', 5\]"):
        OrtRunner().build(linear()).sample(1)
    for session in (
        OrtRunner().build(linear(), batch=4),
        OrtRunner().build(linear(None), batch=4),
        OrtRunner().build(linear(4)),
        OrtRunner().build(linear("n", "f"), feeds_shapes={"x": (4, 5)}),
    ):
        assert session.sample(2) > 0


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL])
def test_sample_makes_up_inputs_of_every_kind(kind: int) -> None:
    assert OrtRunner().build(to_precision(kind)).sample(3) > 0


def test_sample_refuses_what_it_cannot_make_up() -> None:
    with pytest.raises(SluiceError, match=r"input 'x' is tensor\(string\)"):
        OrtRunner().build(to_precision(TensorProto.STRING)).sample(1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"batch": 0}, "batch=0"),
        ({"feeds_shapes": {"z": (1,)}}, r"no input 'z'; its inputs are \['x'\]"),
        ({"feeds_shapes": {"x": (4, 6)}}, r"shape \['n', 5\], which \[4, 6\] does not fit"),
        ({"feeds_shapes": {"x": (4,)}}, "does not fit"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(SluiceError, match=reason):
        OrtRunner().build(linear(), **arguments)  # type: ignore[arg-type]


def test_one_name_has_one_size() -> None:
    with pytest.raises(SluiceError, match="dimension 'n' of the model in memory is given two sizes, 4 and 5"):
        OrtRunner().build(linear("n", "n"), feeds_shapes={"x": (4, 5)})


@pytest.mark.parametrize("batch", [None, 2])
def test_a_file_that_does_not_load_is_named(tmp_path: Path, batch: int | None) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model at all")
    with pytest.raises(SluiceError, match=r"broken\.onnx: \S+"):
        OrtRunner().build(broken, batch=batch)
    with pytest.raises(SluiceError, match=r"missing\.onnx: \S+"):
        OrtRunner().build(tmp_path / "missing.onnx", batch=batch)


def test_a_graph_that_does_not_load_gives_the_reason() -> None:
    model = linear()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(SluiceError, match=r"the model in memory: .*NoSuchOperator"):
        OrtRunner().build(model)


def test_feeds_must_match() -> None:
    session = OrtRunner().build(linear())
    for feeds in ({}, {"q": np.ones((2, 5), np.float32)}, {"x": np.ones((2, 5), np.float64)}):
        with pytest.raises(SluiceError, match="cannot run"):
            session.run(feeds)


def test_the_clock_follows_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OrtRunner(2).clock == "wall"
    assert OrtRunner(2).build(linear(), batch=2).clock == "wall"
    # A system whose CPU-time clock ticks coarsely is timed by the wall.
    monkeypatch.setattr(host, "MAX_CLOCK_RESOLUTION_S", 0.0)
    assert OrtRunner(1).clock == "wall"


def test_workers_of_the_session_before_have_stopped_when_a_burst_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """They spin for as long as they were told, and a burst begins only after twice as long."""
    entry = "session.intra_op.spin_duration_us"
    one, two = (OrtRunner(threads).build(linear(), batch=4) for threads in (1, 2))
    assert two._session.get_session_options().get_session_config_entry(entry) == str(ort_module.SPIN_US)
    with pytest.raises(RuntimeError):
        one._session.get_session_options().get_session_config_entry(entry)

    now = 0.0  # microseconds; only an inference takes any

    def clock() -> int:
        return int(1000 * now)

    class Counted:
        done: ClassVar[list[float]] = []

        def run_with_iobinding(self, binding: object) -> None:
            nonlocal now
            self.done.append(now)
            now += 30

    monkeypatch.setattr(ort_module.time, "perf_counter_ns", clock)
    for session, before in ((one, 1), (two, 7)):
        session._binding, session._session = object(), Counted()
        session._now_ns = clock
        now, Counted.done = 0.0, []
        assert session.sample(5) == pytest.approx(0.03)
        assert len(Counted.done) == before + 5


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of the process in /proc")
def test_one_thread_starts_no_other() -> None:
    """The premise of timing the calling thread alone."""
    assert OrtRunner(1).clock == "thread_cpu"
    OrtRunner(1).build(linear(), batch=2).sample(1)
    before = len(os.listdir("/proc/self/task"))
    single = OrtRunner(1).build(linear(), batch=2)
    single.sample(1)
    assert len(os.listdir("/proc/self/task")) == before
    several = OrtRunner(3).build(linear(), batch=2)
    several.sample(1)
    assert len(os.listdir("/proc/self/task")) == before + 2


def subnormal() -> bool:
    """Whether the calling thread still computes with subnormal numbers."""
    return bool(np.float32(1e-30) * np.float32(1e-10) > 0)


@pytest.mark.skipif(
    (sys.platform, platform.machine()) not in FLUSH_BITS, reason="no control over the floating-point mode"
)
def test_subnormals_are_flushed_while_timing_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    session = OrtRunner().build(linear(), batch=2)
    assert subnormal()
    seen: list[bool] = []
    now = session._now_ns

    def spy() -> int:
        seen.append(subnormal())
        return now()

    monkeypatch.setattr(session, "_now_ns", spy)
    session.sample(1)
    assert seen == [False, False] and subnormal()
    # In a process of its own, because only the first session of a process could spoil it.
    script = (
        "import numpy as np, onnx, sys\n"
        "from sluice.runtime.ort.cpu import OrtRunner\n"
        "OrtRunner().build(sys.stdin.buffer.read(), batch=2).sample(1)\n"
        "assert np.float32(1e-30) * np.float32(1e-10) > 0\n"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", script], input=linear().SerializeToString(), cwd=root, check=True)


def test_only_engines_that_are_not_timed_give_their_memory_back() -> None:
    for runner, kept in ((OrtRunner(), True), (untimed_runner(), False)):
        engine = runner.build(linear())
        assert engine._session.get_session_options().enable_cpu_mem_arena is kept


def test_settings_are_checked() -> None:
    with pytest.raises(SluiceError, match="threads=0"):
        OrtRunner(0)
