from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
import sys
from pathlib import Path
import numpy as np
from sluice.core.heap import give_back_blocks, give_back_holes

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

assert sys.argv[1] != "set" or give_back_blocks()
np.ones(2**24, np.uint8)  # a block that moves the threshold, freed
start = held()
blocks = [np.ones(2**21 if k % 2 else 2**16, np.uint8) for k in range(32)]  # a large one, and a small one behind it
del blocks[1::2]
if sys.argv[1] == "holes":
    give_back_holes()
print(held() - start)
"""


def left_over(word: str) -> int:
    done = subprocess.run([sys.executable, "-c", HOLES, word], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_no_holes_are_left_where_blocks_go_back() -> None:
    small = 16 * 2**16
    assert left_over("set") < small + 2**20
    assert left_over("not") > small + 2**23  # the case is one in which it matters
    assert left_over("holes") < small + 2**20
