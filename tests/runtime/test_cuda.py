"""The calls themselves: what is handed to libcudart, in which order and types; a library of plain functions."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sluice.core.errors import SluiceError
from sluice.runtime.base import cuda as module
from sluice.runtime.base.cuda import Cuda


def library(fails: str = "", status: int = 2) -> tuple[Any, list[tuple[Any, ...]]]:
    """Every function notes its arguments by value and writes 7, 8, 9 to what it is to fill in."""
    calls: list[tuple[Any, ...]] = []
    answers = iter(range(7, 100))

    def function(name: str) -> Callable[..., int]:
        def called(*arguments: Any) -> int:
            found: list[Any] = [name]
            for argument in arguments:
                target = getattr(argument, "_obj", None)
                if target is None:
                    found.append((type(argument).__name__, argument.value))
                elif name != fails:
                    target.value = next(answers)
            calls.append(tuple(found))
            return status if name == fails else 0

        return called

    class Library(SimpleNamespace):
        def __getattr__(self, name: str) -> Callable[..., int]:
            if not name.startswith("cuda"):
                raise AttributeError(name)
            setattr(self, name, function(name))
            return self.__dict__[name]

    return Library(cudaGetErrorString=lambda code: b"out of memory"), calls


POINTER, INT, SIZE = "c_void_p", "c_int", ctypes.c_size_t.__name__


def test_every_call_has_the_arguments_that_cuda_declares() -> None:
    fake, calls = library()
    cuda = Cuda(fake)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    here = array.ctypes.data
    assert (cuda.malloc(24), cuda.stream(), cuda.event()) == (7, 8, 9)
    cuda.upload(7, array, 8)
    cuda.download(array, 7, 8)
    cuda.synchronize(8)
    cuda.record(9, 8)
    cuda.free(7)
    cuda.destroy_event(9)
    cuda.destroy_stream(8)
    assert calls == [
        ("cudaMalloc", (SIZE, 24)),
        ("cudaStreamCreateWithFlags", ("c_uint", 1)),
        ("cudaEventCreateWithFlags", ("c_uint", 0)),
        ("cudaMemcpyAsync", (POINTER, 7), (POINTER, here), (SIZE, 24), (INT, 1), (POINTER, 8)),
        ("cudaMemcpyAsync", (POINTER, here), (POINTER, 7), (SIZE, 24), (INT, 2), (POINTER, 8)),
        ("cudaStreamSynchronize", (POINTER, 8)),
        ("cudaEventRecord", (POINTER, 9), (POINTER, 8)),
        ("cudaFree", (POINTER, 7)),
        ("cudaEventDestroy", (POINTER, 9)),
        ("cudaStreamDestroy", (POINTER, 8)),
    ]


def test_the_second_event_is_waited_for() -> None:
    fake, calls = library()
    assert Cuda(fake).elapsed_ms(3, 4) == 7.0
    assert calls == [("cudaEventSynchronize", (POINTER, 4)), ("cudaEventElapsedTime", (POINTER, 3), (POINTER, 4))]


def test_a_capture_becomes_a_graph_that_is_ready() -> None:
    fake, calls = library()
    cuda = Cuda(fake)
    cuda.begin_capture(5)
    assert cuda.end_capture(5) == 8
    cuda.launch(8, 5)
    cuda.destroy_graph(8)
    assert calls == [
        ("cudaStreamBeginCapture", (POINTER, 5), (INT, 1)),
        ("cudaStreamEndCapture", (POINTER, 5)),
        ("cudaGraphInstantiateWithFlags", (POINTER, 7), (ctypes.c_ulonglong.__name__, 0)),
        ("cudaGraphDestroy", (POINTER, 7)),
        ("cudaGraphLaunch", (POINTER, 8), (POINTER, 5)),
        ("cudaGraphExecDestroy", (POINTER, 8)),
    ]


@pytest.mark.parametrize("name", ["cudaGraphInstantiateWithFlags", "cudaStreamEndCapture"])
def test_a_lost_capture_leaves_nothing_behind(name: str) -> None:
    fake, calls = library(fails=name, status=901)
    with pytest.raises(SluiceError, match=f"{name} failed with CUDA error 901"):
        Cuda(fake).end_capture(5)
    assert [call[0] for call in calls].count("cudaGraphDestroy") == (name != "cudaStreamEndCapture")


@pytest.mark.parametrize(
    ("status", "advice"), [(2, "smaller batch"), (35, "NVIDIA GPU"), (100, "driver"), (700, "smi")]
)
def test_a_failure_is_one_sentence_and_is_cleared(status: int, advice: str) -> None:
    fake, calls = library(fails="cudaMalloc", status=status)
    with pytest.raises(
        SluiceError, match=rf"^cudaMalloc failed with CUDA error {status} \(out of memory\); .*{advice}"
    ):
        Cuda(fake).malloc(1)
    assert calls[-1] == ("cudaGetLastError",)


def test_only_contiguous_arrays_are_copied() -> None:
    fake, calls = library()
    with pytest.raises(AssertionError, match="not contiguous"):
        Cuda(fake).upload(7, np.ones((4, 4))[:, ::2], 8)
    assert not calls


def test_the_library_is_looked_for_until_one_suits_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = library()[0], library(fails="cudaGetDeviceCount", status=35)[0]
    libraries = {"libcudart.so.13": new, "libcudart.so.12": old}

    def load(name: str) -> Any:
        if name not in libraries:
            raise OSError(name)
        return libraries[name]

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(module, "_in_wheels", lambda: iter(()))
    assert Cuda.load()._library is old
    del libraries["libcudart.so.12"]
    with pytest.raises(SluiceError, match="cudaGetDeviceCount failed with CUDA error 35"):
        Cuda.load()
    libraries.clear()
    with pytest.raises(SluiceError, match=r"libcudart.* is not on this machine; install"):
        Cuda.load()


def test_wheels_are_looked_into_without_importing_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = (
        "nvidia/cu13/lib/libcudart.so.13",
        "nvidia/cuda_runtime/lib/libcudart.so.12",
        "torch/lib/libcudart-a1.so.12",
    )
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    spec = {name: SimpleNamespace(submodule_search_locations=[str(tmp_path / name)]) for name in ("nvidia", "torch")}
    monkeypatch.setattr(importlib.util, "find_spec", spec.get)
    assert list(module._in_wheels()) == [str(tmp_path / file) for file in files]
    spec.clear()
    assert list(module._in_wheels()) == []


@pytest.mark.parametrize(
    ("where", "file"),
    [
        (module.LINUX, "cu13/lib/libcudart.so.13"),
        (module.LINUX, "cuda_runtime/lib/libcudart.so.12"),
        (module.WINDOWS, "cu13/bin/x86_64/cudart64_13.dll"),
        (module.WINDOWS, "cu13/bin/cudart64_13.dll"),
        (module.WINDOWS, "cuda_runtime/bin/cudart64_12.dll"),
    ],
)
def test_the_library_is_found_inside_wheels_of_both_systems(
    where: Any, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    monkeypatch.setattr(module, "FOLDERS", where[1])
    assert list(module._in_wheels()) == [str(tmp_path / file)]
