"""ONNX to engine: which TensorRT, which shapes, what the builder is told, and what is said when it refuses."""

from __future__ import annotations

import gc
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.core.errors import SluiceError
from sluice.passes.precision.quantize import quantize
from sluice.runtime.base import nvidia
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.trt import build as trt_build
from sluice.runtime.trt.build import build_engine, check_int8, find_tensorrt, listener, make_builder, static_model
from sluice.runtime.trt.settings import Settings
from tests.device import chain
from tests.fake_tensorrt import fake_tensorrt
from tests.runtime.trt.test_runner import X

NAMES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


def only(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let only these be installed; an empty version is one whose libraries are missing."""

    def load(name: str) -> Any:
        if name not in versions:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if not versions[name]:
            raise ImportError("libnvonnxparser.so.11: cannot open shared object file\nand so on")
        return fake_tensorrt(name=name, version=versions[name])

    monkeypatch.setattr(trt_build, "importlib", SimpleNamespace(import_module=load))


def parser_error(operator: str = "", name: str = "", text: str = "false", node: int = 0) -> SimpleNamespace:
    return SimpleNamespace(node=lambda: node, node_name=lambda: name, node_operator=lambda: operator, desc=lambda: text)


@pytest.mark.parametrize("first", range(3))
def test_the_full_tensorrt_is_taken_before_rtx(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    only(monkeypatch, **dict.fromkeys(NAMES[first:], "11.0.0"))
    assert find_tensorrt().__name__ == NAMES[first]


def test_rtx_takes_the_place_of_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, tensorrt="", tensorrt_rtx_bindings="1.7.1.116")
    assert find_tensorrt().__name__ == "tensorrt_rtx_bindings"


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    with pytest.raises(SluiceError, match="TensorRT is not here; install tensorrt, or tensorrt-rtx-cu13-libs"):
        find_tensorrt()
    only(monkeypatch, tensorrt="")
    with pytest.raises(SluiceError, match=r"not here; tensorrt cannot be loaded \(libnvonnx.*file\); install"):
        find_tensorrt()
    only(monkeypatch, tensorrt="8.6.1")
    with pytest.raises(SluiceError, match=r"TensorRT 8.6.1 is too old; install version 10"):
        find_tensorrt()


def test_a_real_import_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SluiceError, match="TensorRT is not here"):
        find_tensorrt()
    present = ModuleType("tensorrt_rtx")
    present.__dict__["__version__"] = "1.7.1"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", present)
    assert find_tensorrt() is present


@pytest.mark.parametrize(
    ("name", "version", "flags"),
    [("tensorrt", "11.4.0.106", 0), ("tensorrt", "10.16.1.11", 2), ("tensorrt_rtx", "1.7.1.116", 0)],
)
def test_networks_are_strongly_typed(name: str, version: str, flags: int) -> None:
    trt = fake_tensorrt(name=name, version=version)
    build_engine(trt, chain([5]))
    assert trt.calls["flags"] == flags


def test_the_builder_is_told_the_settings() -> None:
    trt = fake_tensorrt()
    build_engine(trt, chain([5]), settings=Settings(workspace_mib=512, optimization_level=4))
    assert trt.calls["workspace"] == 512 * 2**20
    assert trt.calls["builder_optimization_level"] == 4
    assert trt.calls["profiling_verbosity"] == "detailed"
    plain = fake_tensorrt()
    build_engine(plain, chain([5]))
    assert "workspace" not in plain.calls and "builder_optimization_level" not in plain.calls


@pytest.mark.parametrize("wrong", [{"workspace_mib": 0}, {"optimization_level": 6}, {"optimization_level": -1}])
def test_settings_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(SluiceError, match="give"):
        Settings(**wrong)


@pytest.mark.parametrize("wrong", [b"foreign tactics", b"broken tactics"])
def test_a_cache_of_another_device_or_version_is_begun_anew(wrong: bytes) -> None:
    trt = fake_tensorrt()
    built = build_engine(trt, chain([5]), cache=wrong)
    assert trt.calls["caches"] == [wrong, b""]
    assert built.cache and b"tactics" not in built.cache
    assert build_engine(trt, chain([5]), cache=built.cache).cache == built.cache
    with pytest.raises(SluiceError, match="cannot build the model in memory: no kernel;"):
        build_engine(fake_tensorrt(build_error="no kernel"), chain([5]), cache=wrong)


def test_a_builder_can_be_kept() -> None:
    trt = fake_tensorrt()
    builder = make_builder(trt)
    plans = [build_engine(trt, chain([width]), builder=builder).plan for width in (5, 7)]
    assert trt.calls["builders"] == 1
    assert plans == [chain([width]).SerializeToString() for width in (5, 7)]
    build_engine(trt, chain([5]))
    assert trt.calls["builders"] == 2


def test_one_logger_outlives_all_builds() -> None:
    trt, other = fake_tensorrt(build_error="no kernel"), fake_tensorrt()
    assert listener(trt) is listener(trt) is not listener(other)
    for _ in range(2):
        with pytest.raises(SluiceError, match="no kernel"):
            build_engine(trt, chain([5]))
        gc.collect()
    builder = make_builder(other)
    listener(other).errors.append("of an earlier build")
    build_engine(other, chain([5]), builder=builder)
    assert not listener(other).errors
    none = fake_tensorrt(starts=False)
    listener(none).errors.append("of an earlier build")
    with pytest.raises(SluiceError, match="cannot start on this machine: CUDA initialization failure"):
        make_builder(none)


def test_rtx_has_no_timing_cache() -> None:
    trt = fake_tensorrt(name="tensorrt_rtx")
    assert build_engine(trt, chain([5]), cache=b"[old]").cache == b"[old]"
    assert not trt.calls["caches"]


def test_engines_of_rtx_can_be_captured() -> None:
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        trt = fake_tensorrt(name=name)
        build_engine(trt, chain([5]))
        assert trt.calls["builder_flags"] == ["user_allocation"]
    old = fake_tensorrt(name="tensorrt_rtx", version="1.1.1.26")
    del old.BuilderFlag.REQUIRE_USER_ALLOCATION
    for trt in (old, fake_tensorrt()):
        assert build_engine(trt, chain([5])).plan
        assert "builder_flags" not in trt.calls


@pytest.mark.parametrize("capability", [None, (8, 9)])
def test_engines_of_rtx_are_for_the_device_that_is_here(
    capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "compute_capability", lambda: capability)
    trt = fake_tensorrt(name="tensorrt_rtx")
    build_engine(trt, chain([5]))
    assert trt.calls.get("capabilities") == ([("current", 0)] if capability else None)
    assert trt.calls.get("num_compute_capabilities") == (1 if capability else None)
    full = fake_tensorrt()
    build_engine(full, chain([5]))
    assert "capabilities" not in full.calls


def test_int8_is_not_for_rtx() -> None:
    model = quantize(chain([5]), target="tensorrt")
    with pytest.raises(SluiceError, match="gains nothing from int8 in the model in memory: its conv"):
        check_int8(fake_tensorrt(name="tensorrt_rtx", version="1.7.1"), model)
    check_int8(fake_tensorrt(), model)
    check_int8(fake_tensorrt(name="tensorrt_rtx"), chain([5]))


MISMATCH = """Invalid Node - conv
ITensor::getDimensions: Error Code 4: API Usage Error (conv: not of one type. In validateTypes at /_src/nodes.cpp:88)
[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (no device)"""


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        (
            [parser_error("Conv", "conv", MISMATCH)],
            r"'conv' \(Conv\): conv: not of one type;",
        ),
        ([parser_error("Unique", "u")], r"'u' \(Unique\): it does not support this operator, or not with these"),
        (
            [parser_error("Foo", "f", 'creator && "Plugin not found, is it?"')],
            r"'f' \(Foo\): Plugin not found, is it\?;",
        ),
        ([parser_error("Relu", text="bad", node=1)], r"node 'node_of_a0' \(Relu\): bad;"),
        ([parser_error(text="no node\nsecond"), parser_error("Relu", "r", "bad")], r"node 'r' \(Relu\): bad;"),
        ([parser_error(text="Failed to parse.")], r"Failed to parse;"),
    ],
)
def test_the_node_that_the_parser_refuses_is_named(errors: list[SimpleNamespace], words: str) -> None:
    with pytest.raises(
        SluiceError, match=f"^TensorRT 11.4.0.106 cannot parse the model in memory: .*{words}"
    ) as caught:
        build_engine(fake_tensorrt(errors=errors), chain([5]))
    assert "\n" not in str(caught.value) and "_src" not in str(caught.value)


def test_a_failed_build_gives_tensorrts_reason() -> None:
    reason = "IBuilder::build: Error Code 10: Internal Error (Could not find any implementation for node c0 (Conv).)"
    with pytest.raises(SluiceError, match=r"cannot build the model .*: Could not find .* node c0 \(Conv\); change"):
        build_engine(fake_tensorrt(build_error=reason), chain([5]))
    with pytest.raises(
        SluiceError, match=r"cannot start on this machine: CUDA initialization failure .* 35; run where"
    ):
        build_engine(fake_tensorrt(starts=False), chain([5]))


@pytest.mark.parametrize("form", ["model", "bytes", "path"])
def test_a_model_in_any_form(form: str, tmp_path: Any) -> None:
    model, trt = chain([5], batch="N"), fake_tensorrt()
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    given_ = {"model": model, "bytes": model.SerializeToString(), "path": path}[form]
    assert onnx.load_model_from_string(build_engine(trt, given_, batch=2).plan) == static_model(model, 2)
    path.write_bytes(b"\x07nonsense")
    with pytest.raises(SluiceError, match=r"cannot load .*model.onnx: .*; check that it is an ONNX file"):
        build_engine(trt, path)


def test_weights_beside_the_file_come_along(tmp_path: Any) -> None:
    model = chain([33], batch=2)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    plan = build_engine(fake_tensorrt(), tmp_path / "model.onnx").plan
    (tmp_path / "weights").unlink()
    assert_close(OrtRunner().build(plan).run({"x": X[:2]}), OrtRunner().build(chain([33], batch=2)).run({"x": X[:2]}))


@given(batch=st.integers(1, 64))
def test_the_batch_is_written_into_the_model(batch: int) -> None:
    model = chain([5], batch="N")
    before = model.SerializeToString()
    static = static_model(model, batch)
    dims = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in (*static.graph.input, *static.graph.output)]
    assert dims == [[batch, 3, 9, 9], [batch, 5]]
    assert model.SerializeToString() == before and not static.graph.value_info
    assert static_model(static) is static
    whole = static_model(model, 1, {"x": [batch, 3, 9, 9]})
    assert whole == static


def test_a_size_that_is_missing_or_wrong_is_refused() -> None:
    model = chain([5], batch="N")
    with pytest.raises(SluiceError, match=r"input 'x' of the model in memory has dynamic shape \['N', 3, 9, 9\]"):
        static_model(model)
    with pytest.raises(SluiceError, match="batch=0"):
        static_model(model, 0)
    with pytest.raises(SluiceError, match="does not fit"):
        static_model(model, None, {"x": [2, 4, 9, 9]})
    with pytest.raises(SluiceError, match="no input 'z'"):
        static_model(model, 2, {"z": [2]})
