"""A plan survives its file, and refuses what it was not made for."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically
from sluice.core.plan import FORMS, Drop, Factorize, InputSpec, Merge, Plan, Slice

GOLDEN = Path(__file__).parents[1] / "golden"
TOY = Plan(
    {"conv.weight": (6, 3, 3, 3), "conv.bias": (6,), "fc.weight": (4, 24), "fc.bias": (4,), "steps": ()},
    (
        Slice("conv.weight", 0, 6, (0, 2, 3)),
        Slice("conv.bias", 0, 6, (0, 2, 3)),
        Slice("fc.weight", 1, 24, (0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15)),
    ),
    (InputSpec((2, 3, 4, 4), "float32"),),
    {"conv": 3},
)
DEEP = Plan(
    {
        **{f"layers.{k}.weight": (7, 7, 3, 3) for k in range(4)},
        **{f"block.{name}": shape for name, shape in {"conv.weight": (7, 7, 3, 3), "bn.weight": (7,)}.items()},
        "stem.weight": (7, 3, 5, 5),
        "fc.weight": (5, 7),
    },
    (Slice("stem.weight", 0, 7, (0, 1, 4, 5, 6)), Slice("fc.weight", 1, 7, (0, 1, 4, 5, 6))),
    (InputSpec((2, 3, 9, 9), "float32"),),
    {"stem": 5},
    factorizations=(Factorize("stem.weight", "kx1-1xk", 4), Factorize("fc.weight", "1x1-kxk", 2)),
    drops=(Drop("block", ("block.bn.weight", "block.conv.weight")),),
    merges=(
        Merge(
            ("layers.0.weight", "layers.1.weight", "layers.2.weight", "layers.3.weight"),
            (("layers.0.weight", "layers.1.weight"), ("layers.3.weight",)),
        ),
    ),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    shapes = draw(
        st.dictionaries(
            st.text("abc._0", min_size=1, max_size=6),
            st.lists(st.integers(1, 9), max_size=4).map(tuple),
            min_size=1,
            max_size=4,
        )
    )
    slices = []
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            if draw(st.booleans()):
                keep = draw(st.sets(st.integers(0, size - 1), min_size=1))
                slices.append(Slice(name, axis, size, tuple(sorted(keep))))
    inputs = draw(st.lists(st.builds(InputSpec, st.tuples(st.integers(1, 9)), st.sampled_from(["float32", "int64"]))))
    widths = draw(st.dictionaries(st.sampled_from(sorted(shapes)), st.integers(1, 9)))
    free = draw(st.permutations(sorted(shapes)))  # every tensor takes part in one edit at most
    factorizations = []
    if len(shapes[free[-1]]) > 1 and draw(st.booleans()):
        name = free.pop()
        most = min(shapes[name][:2]) * math.prod(shapes[name][2:])
        factorizations.append(Factorize(name, draw(st.sampled_from(FORMS)), draw(st.integers(1, most))))
    drops, merges = [], []
    if free and draw(st.booleans()):
        drops.append(Drop(draw(st.text("ab.", max_size=4)), (free.pop(),)))
    if len(free) >= 2 and draw(st.booleans()):
        first, second = free.pop(), free.pop()
        runs = draw(st.sampled_from([((first, second),), ((first,), (second,)), ((first,),), ((second,),)]))
        merges.append(Merge((first, second), runs))
    return Plan(
        shapes, tuple(draw(st.permutations(slices))), tuple(inputs), widths,
        factorizations=tuple(factorizations), drops=tuple(drops), merges=tuple(merges),
    )  # fmt: skip


@given(plans())
def test_json_round_trip(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()


def test_order_of_slices_is_irrelevant() -> None:
    turned = dataclasses.replace(TOY, slices=TOY.slices[::-1])
    assert turned == TOY and turned.to_json() == TOY.to_json()


@pytest.mark.parametrize("kind", ["slices", "factorizations"])
def test_order_of_edits_is_irrelevant(kind: str) -> None:
    turned = dataclasses.replace(DEEP, **{kind: getattr(DEEP, kind)[::-1]})
    assert turned == DEEP and turned.to_json() == DEEP.to_json()


@pytest.mark.parametrize(("version", "plan"), [(1, TOY), (2, DEEP)])
def test_golden_versions_load(version: int, plan: Plan) -> None:
    path = GOLDEN / f"plan-v{version}.json"
    assert json.loads(path.read_text())["version"] == version
    assert Plan.load(path) == plan


def test_edited_names_every_tensor_of_every_edit() -> None:
    assert DEEP.edited() == set(DEEP.fingerprint)
    assert dataclasses.replace(DEEP, drops=()).edited() == {n for n in DEEP.fingerprint if not n.startswith("block")}
    assert dataclasses.replace(DEEP, merges=()).edited() == {n for n in DEEP.fingerprint if not n.startswith("layers")}


def test_a_file_must_hold_what_edits_name() -> None:
    """Of an ONNX file only the edited tensors are asked for, those of structural edits among them."""
    bare = dataclasses.replace(DEEP, slices=())
    bare.check_model(DEEP.fingerprint, complete=False)
    for name in DEEP.fingerprint:
        without = {n: s for n, s in DEEP.fingerprint.items() if n != name}
        with pytest.raises(SluiceError, match=f"'{name}' is missing"):
            bare.check_model(without, complete=False)


@pytest.mark.parametrize("edit", [{"form": "kxk"}, {"rank": 0}, {"form": ""}])
def test_bad_factorizations(edit: dict[str, object]) -> None:
    with pytest.raises(SluiceError, match=r"bad factorization of 'fc\.weight'"):
        Factorize(**{"param": "fc.weight", "form": "kxk-1x1", "rank": 2, **edit})  # type: ignore[arg-type]


@pytest.mark.parametrize("runs", [(), ((),), (("a",), ()), (("c",),), (("b", "a"),), (("b",), ("a",)), (("a", "a"),)])
def test_bad_merges(runs: tuple[tuple[str, ...], ...]) -> None:
    with pytest.raises(SluiceError, match=r"bad merge of \['a', 'b'\]"):
        Merge(("a", "b"), runs)


@pytest.mark.parametrize(
    "extra",
    [
        {"factorizations": (Factorize("layers.2.weight", "kxk-1x1", 2),)},  # removed by the merge
        {"factorizations": (*DEEP.factorizations, Factorize("stem.weight", "kxk-1x1", 2))},
        {"drops": (*DEEP.drops, Drop("layers", ("layers.0.weight",)))},
        {
            "merges": (
                *DEEP.merges,
                Merge(("stem.weight", "block.conv.weight"), (("stem.weight", "block.conv.weight"),)),
            )
        },
    ],
)
def test_a_tensor_takes_part_in_one_edit(extra: dict[str, object]) -> None:
    with pytest.raises(SluiceError, match=r"the plan changes '.*' twice"):
        dataclasses.replace(DEEP, **extra)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "extra",
    [
        {"factorizations": (Factorize("x", "kxk-1x1", 2),)},
        {"drops": (Drop("block", ("x",)),)},
        {"merges": (Merge(("layers.0.weight", "x"), (("layers.0.weight",),)),)},
    ],
)
def test_edits_name_tensors_of_the_model(extra: dict[str, object]) -> None:
    with pytest.raises(SluiceError, match="the plan changes 'x', which its own model lacks"):
        dataclasses.replace(DEEP, **extra)  # type: ignore[arg-type]


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    TOY.save(path)
    assert Plan.load(path) == TOY
    assert os.listdir(path.parent) == ["plan.json"]


@pytest.mark.parametrize("keep", [(), (1, 0), (0, 0), (-1, 2), (0, 6)])
def test_bad_indices(keep: tuple[int, ...]) -> None:
    with pytest.raises(SluiceError, match=r"bad slice of 'conv\.weight' axis 0"):
        Slice("conv.weight", 0, 6, keep)


def test_bad_axis() -> None:
    with pytest.raises(SluiceError, match="bad slice"):
        Slice("conv.weight", -1, 6, (0,))


def test_one_axis_is_sliced_once() -> None:
    with pytest.raises(SluiceError, match=r"slices 'conv\.bias' axis 0 twice"):
        Plan(TOY.fingerprint, (*TOY.slices, Slice("conv.bias", 0, 6, (1,))))


@pytest.mark.parametrize(
    "bad", [Slice("conv.bias", 0, 7, (1,)), Slice("conv.bias", 1, 6, (1,)), Slice("x", 0, 2, (1,))]
)
def test_slices_fit_the_fingerprint(bad: Slice) -> None:
    with pytest.raises(SluiceError, match="the file is damaged"):
        Plan(TOY.fingerprint, (bad,))


def test_right_model_passes() -> None:
    TOY.check_model(TOY.fingerprint)
    TOY.check_model({s.param: TOY.fingerprint[s.param] for s in TOY.slices}, complete=False)


def test_wrong_model_is_refused_with_the_first_differences() -> None:
    other = {**TOY.fingerprint, "conv.bias": (5,), "fc.bias": (3,), "head.weight": (2, 2), "head.bias": (2,)}
    del other["fc.weight"]
    with pytest.raises(SluiceError) as error:
        TOY.check_model(other)
    message = str(error.value)
    assert "'conv.bias' is (5,) instead of (6,)" in message and "'fc.weight' is missing instead of (4, 24)" in message
    assert "and 2 more" in message
    with pytest.raises(SluiceError, match=r"'head\.bias' \(2,\) is unknown to it"):
        TOY.check_model({**TOY.fingerprint, "head.bias": (2,)})
    TOY.check_model({**TOY.fingerprint, "head.bias": (2,)}, complete=False)


def changed(**fields: object) -> str:
    return json.dumps({**json.loads(TOY.to_json()), **fields})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        "{}",
        TOY.to_json()[:150],
        changed(format="something else"),
        changed(slices=[{"param": "conv.bias"}]),
        changed(slices=[{"param": "conv.bias", "axis": 0, "size": 6, "keep": [1, 2]}]),
        changed(fingerprint=[1]),
        changed(inputs=[{}]),
        changed(widths={"conv": "wide"}),
        changed(factorizations=[{"param": "fc.weight", "form": "kxk-1x1"}]),
        changed(factorizations=[{"param": "fc.weight", "form": "kxk-1x1", "rank": "half"}]),
        changed(drops=["conv"]),
        changed(drops=[{"name": "conv"}]),
        changed(merges=[{"layers": ["conv.weight"], "runs": [1]}]),
    ],
)
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(SluiceError, match="the plan is not a readable sluice plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("version", ["1", 0, -7, True, 1.5, None, [2]])
def test_versions_that_are_none(version: object) -> None:
    with pytest.raises(SluiceError, match=r"is not a readable sluice plan \(its version is"):
        Plan.from_json(changed(version=version))


@pytest.mark.parametrize("version", [3, 99])
def test_other_versions_are_refused(version: object) -> None:
    with pytest.raises(SluiceError, match=rf"has version {version}, this sluice reads up to 2"):
        Plan.from_json(changed(version=version))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SluiceError, match=r"give the path of a plan\.json"):
        Plan.load(tmp_path / "nothing.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SluiceError, match=r"is no text, and so not a plan\.json"):
        Plan.load(tmp_path / "binary")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    TOY.save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SluiceError, match="No space left on device"):
        write_atomically(path, before[:-9])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SluiceError, match="cannot write"):
        write_atomically(tmp_path / "file" / "plan.json", b"x")


DENSE = {"w": [16, 13, 3, 3], "b": [16]}
HOSTILE: list[dict[str, object]] = [
    {"slices": [{"param": "w", "axis": 0, "size": 16, "keep": [[0, 10**10]]}]},
    {"slices": [{"param": "w", "axis": 0, "size": 10**10, "keep": [[0, 10**10]]}]},
    {"fingerprint": {"w": [10**10]}, "slices": [{"param": "w", "axis": 0, "size": 10**10, "keep": [[0, 10**10]]}]},
    {
        "fingerprint": {"w": [2**31 - 1]},
        "slices": [{"param": "w", "axis": 0, "size": 2**31 - 1, "keep": [[0, 2**31 - 1]]}],
    },
    {"slices": [{"param": "w", "axis": 0, "size": 16, "keep": [[4, 2]]}]},
    {"slices": [{"param": "w", "axis": 0, "size": 16, "keep": [[-3, 2]]}]},
    {"slices": [{"param": "w", "axis": -1, "size": 3, "keep": [[0, 2]]}]},
    {"slices": [{"param": "w", "axis": 0, "size": 16, "keep": [[0, 2, 3]]}]},
    {"slices": [{"param": "w", "axis": 0, "size": 16, "keep": [[0, 2], [1, 3]]}]},
    {"slices": [{"param": "w", "axis": True, "size": 13, "keep": [[0, 2]]}]},
    {"slices": [{"param": ["w"], "axis": 0, "size": 16, "keep": [[0, 2]]}]},
    {"slices": [{"param": "w", "axis": 0, "size": 16, "keep": [[0, 2]], "more": 1}]},
    {"slices": "none"},
    {"slices": {"w": 1}},
    {"factorizations": [{"param": "w", "form": "kxk-1x1", "rank": 10**9}]},
    {"factorizations": [{"param": "w", "form": "kxk-1x1", "rank": 118}]},
    {"factorizations": [{"param": "b", "form": "kxk-1x1", "rank": 1}]},
    {"factorizations": [{"param": "w", "form": "kxk-1x1", "rank": 2.0}]},
    {"widths": {"w": "16"}},
    {"widths": [["w", 16]]},
    {"fingerprint": {"w": [1.5]}},
    {"fingerprint": {"w": [-1]}},
    {"fingerprint": ["w"]},
    {"inputs": [{"shape": [1, -3], "dtype": "float32"}]},
    {"inputs": [{"shape": [1], "dtype": 7}]},
    {"drops": [{"name": "w", "params": "w"}]},
    {"merges": [{"layers": ["w"], "runs": [["b"]]}]},
    {"merges": [{"layers": [], "runs": []}]},
    {"inputs": float("nan")},
]


@pytest.mark.parametrize("change", HOSTILE, ids=range(len(HOSTILE)))
def test_sizes_and_types_that_no_plan_has(change: dict[str, object]) -> None:
    sound = {"format": "sluice-plan", "version": 2, "fingerprint": DENSE, "inputs": [], "widths": {}, "slices": []}
    Plan.from_json(json.dumps(sound))
    started = time.process_time()
    with pytest.raises(SluiceError) as told:
        Plan.from_json(json.dumps({**sound, **change}))
    assert "\n" not in str(told.value) and time.process_time() - started < 1.0


def test_many_names_take_no_quadratic_time() -> None:
    """Of 4,000 tensors, more than ten times as many comparisons would take minutes."""
    names = [f"layer{i}.weight" for i in range(4000)]
    plan = Plan(
        {name: (2, 2) for name in names}, tuple(Slice(name, 0, 2, (0,)) for name in names),
        drops=(Drop("d", tuple(names[:2000])),),
        merges=(Merge(tuple(names[2000:]), tuple((n,) for n in names[2000:])),),
    )  # fmt: skip
    started = time.process_time()
    assert Plan.from_json(plan.to_json()) == plan
    assert time.process_time() - started < 2.0
