"""The harness of kills sees what it is there to see: a few sound commands, and one of each fault."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import kills, tiny
from tests.kills import Command, file, keys_of, older, run, save, weights, whole

KILLS = 6


def mixes(folder: Path) -> object:
    """Writes the files of a result one by one over the older ones."""
    for name, content in tiny._compressed().items():
        (folder / "slim" / name).write_bytes(content + (b"\n" if name.endswith("json") else b""))
        time.sleep(0.05)
    return 0


def leaves_a_draft(folder: Path) -> object:
    (folder / f".x.{os.getpid()}.draft").mkdir()
    time.sleep(0.1)
    return 0


def loses_points(folder: Path) -> object:
    connection = sqlite3.connect(folder / "t.db")
    with connection:
        connection.execute("DELETE FROM points WHERE key = (SELECT key FROM points LIMIT 1)")
    connection.close()
    time.sleep(0.1)
    return 0


def differs(folder: Path) -> object:
    (folder / "f").write_text(str(os.getpid()))
    time.sleep(0.05)
    return 0


def test_sound_commands_have_no_faults() -> None:
    sound = [one for one in kills.commands() if one.name in ("save", "merge", "profile")]
    found = run(2 * len(sound), asked=sound)
    assert found == {"kills": 2 * len(sound), "points_lost": 0, "mixed": 0, "drafts": 0, "differ": 0}


@pytest.mark.parametrize(
    ("fault", "work", "same"),
    [
        ("mixed", mixes, whole),
        ("drafts", leaves_a_draft, whole),
        ("points_lost", loses_points, weights),
        ("differ", differs, file("f")),
    ],
)
def test_a_planted_fault_is_counted(fault: str, work: Callable[[Path], object], same: Callable[[Path], object]) -> None:
    found = run(KILLS, asked=[Command("planted", older, work, same)])
    assert found["kills"] == KILLS and found[fault] > 0


def test_what_is_compared_can_differ(tmp_path: Path) -> None:
    older(tmp_path)
    before = (whole(tmp_path), weights(tmp_path), keys_of(tmp_path))
    save(tmp_path)
    assert whole(tmp_path) == before[0] and weights(tmp_path) != before[1] and keys_of(tmp_path) == before[2]
