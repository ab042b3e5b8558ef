"""A failure that nobody foresaw is the file's where the file is damaged, and ours where it is sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.commands.blame import blamed
from sluice.core.errors import SluiceError
from tests import tiny


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("sound", "damaged", "field"),
    [(b"pytorch", b"pyt\xc2rch", "producer_name"), (b"conv1.weight", b"conv1\xffweight", "input|name|output")],
)
def test_a_text_that_is_no_text_is_damage(
    sound: bytes, damaged: bytes, field: str, whole: bool, tmp_path: Path
) -> None:
    path = tiny.dense_onnx_in(tmp_path)
    content = path.read_bytes()
    assert sound in content
    path.write_bytes(content.replace(sound, damaged))
    with (
        pytest.raises(SluiceError, match=rf"dense\.onnx' is not a sound ONNX file \(the ({field}) .* is no text\)"),
        blamed([str(path if whole else tmp_path)]),
    ):
        raise AttributeError


def test_of_a_sound_file_it_is_ours(tmp_path: Path) -> None:
    path = tiny.dense_onnx_in(tmp_path)
    with pytest.raises(AttributeError), blamed([str(path), str(tmp_path), "nowhere.onnx"]):
        raise AttributeError
