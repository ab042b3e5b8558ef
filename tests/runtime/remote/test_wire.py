from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from sluice.core.errors import SluiceError
from sluice.runtime.remote.wire import VERSION, Hello, from_json, pack, readable, unpack

HELLO = Hello(VERSION, "ort-cpu", "a device", "1.0", "wall", 1, ("ab",), True, False)


def test_tensors_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    sent = {
        "x": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "a name: with \n everything": np.arange(6, dtype=np.int64).reshape(2, 3).T,
        "one": np.float64(3.5),
        "none": np.zeros((0, 4), np.int8),
        "half": np.array([1.5, np.nan], np.float16),
        "bf16": np.array([[1, 2]], ml_dtypes.bfloat16),
        "bool": np.array([True, False]),
    }
    found = unpack(pack(sent))
    assert list(found) == list(sent)
    for name, value in sent.items():
        assert found[name].dtype == np.asarray(value).dtype and found[name].shape == np.shape(value)
        np.testing.assert_array_equal(found[name].astype(np.float64), np.asarray(value).astype(np.float64))
        assert found[name].flags.writeable and found[name].flags.aligned
    assert unpack(pack({})) == {}


def test_what_is_no_number_is_not_sent() -> None:
    for value in (np.array(["a"]), np.array([object()]), np.array([1j]), np.array(["2020"], "M8[D]")):
        with pytest.raises(SluiceError, match="cannot send 'x'"):
            pack({"x": value})


@pytest.mark.parametrize(
    "head",
    [
        [["x", "float32", [3]]],
        [["x", "float32", [1]]],
        [["x", "float32", [1]], ["y", "float32", [1]], ["z", "int8", [1]]],
        [["x", "float32", [-2]]],
        [["x", "float32", [2.0]]],
        [["x", "float32", [True, 2]]],
        [["x", "float32", [1 << 62, 1 << 62]]],
        [["x", "float32", 2]],
        [["x", "object", [1]]],
        [["x", "O", [1]]],
        [["x", ["float32"], [2]]],
        [[3, "float32", [2]]],
        [["x", "float32"]],
        {"x": 1},
        3,
        None,
    ],
)
def test_tensors_that_lie(head: object) -> None:
    with pytest.raises(SluiceError, match="not as long as they say, or are none"):
        unpack(json.dumps(head).encode() + b"\n" + struct.pack("<2f", 1, 2))


@pytest.mark.parametrize("content", [b"", b"\n", b"[", b"\xff\xfe\n", b"[" * 60_000 + b"\n", b"x" * 100_000])
def test_heads_that_are_none(content: bytes) -> None:
    with pytest.raises(SluiceError, match="not JSON, or is nested too deeply"):
        unpack(content)


def test_json_that_is_too_deep_is_a_sentence() -> None:
    with pytest.raises(SluiceError, match="nested too deeply"):
        from_json(b"[" * 60_000 + b"]" * 60_000)


def test_hello_travels_as_json() -> None:
    assert Hello.of(json.loads(json.dumps(HELLO.to_json()))) == HELLO


@pytest.mark.parametrize(
    "wrong", [3, None, [], {}, {"format": "1"}, {"device": 3}, {"threads": True}, {"parts": 1}, {"free_borders": "yes"}]
)
def test_what_says_no_hello(wrong: object) -> None:
    told = {**HELLO.to_json(), "host": ["ab"], **wrong} if isinstance(wrong, dict) and wrong else wrong
    with pytest.raises(SluiceError, match="it is no `sluice serve`"):
        Hello.of(told)


def test_another_format_is_told() -> None:
    with pytest.raises(SluiceError, match=r"it speaks format 2, this is 1; use one release of sluice on both sides"):
        Hello.of({"format": 2})


def test_names_obey_no_terminal() -> None:
    assert readable("a\x1b[31mb\nc") == "a [31mb c" and len(readable("x" * 10_000)) == 2000
