from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from sluice.core.heap import own_circles

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


class Node:
    other: Node


def circle() -> tuple[Node, weakref.ref[Node]]:
    one, two = Node(), Node()
    one.other, two.other = two, one
    return one, weakref.ref(one)


@pytest.mark.parametrize("collects", [True, False])
def test_a_block_lets_its_own_circles_go_and_looks_at_no_others(collects: bool) -> None:
    was = gc.isenabled()
    gc.disable()
    try:
        held, older = circle()
        gc.collect()
        del held  # of an old generation
        if collects:
            gc.enable()
        with pytest.raises(ZeroDivisionError), own_circles():
            mine = circle()[1]
            made = [Node() for _ in range(10**5)]  # the collector would have come by
            assert mine() is not None and older() is not None and made
            _ = 1 / 0
        assert mine() is None and older() is not None and gc.isenabled() == collects
    finally:
        (gc.enable if was else gc.disable)()
