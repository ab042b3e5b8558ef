from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from sluice.artifacts.store import load, read_tensors, save_weights
from sluice.core.errors import SluiceError
from sluice.core.plan import InputSpec, Plan
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.gates.gating import close_gates, insert_gates, strip_gates
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, example_inputs_of, input_specs
from sluice.runtime.base.compare import assert_close
from tests import networks, tiny


def cut(model: nn.Module, inputs: object, seed: int = 1) -> tuple[fx.GraphModule, Plan]:
    """A slim network whose weights have moved on, as after fine-tuning, and its plan."""
    gm = capture(model, inputs)  # type: ignore[arg-type]
    analysis = analyze(gm)
    plan = make_plan(analysis, networks.random_kept(analysis, seed), input_specs(gm))
    slim = rewrite_torch(gm, plan, inputs).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in slim.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.25)
    return slim, plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    slim, plan = cut(tiny.model(), tiny.inputs())
    plan.save(tmp_path / "plan.json")
    save_weights(slim, tmp_path / "slim.safetensors")
    return tmp_path


def test_round_trip(tmp_path: Path) -> None:
    for name in ("plain", "in_place"):
        model, inputs = networks.build(name)
        slim, plan = cut(model, inputs)
        plan.save(tmp_path / "plan.json")
        save_weights(slim, tmp_path / "slim.safetensors")
        # Weights come from the file, so those of the factory's model do not matter.
        loaded = load(networks.NETWORKS[name][0], tmp_path)
        assert not loaded.training
        assert_close(loaded(*inputs), slim(*inputs), tol=1e-6)
        own, others = loaded.state_dict(), slim.state_dict()
        assert own.keys() == others.keys() and all(torch.equal(own[n], others[n]) for n in own)


def test_plan_and_weights_in_other_places(folder: Path) -> None:
    (folder / "other").mkdir()
    weights = (folder / "slim.safetensors").rename(folder / "other" / "w.safetensors")
    x = tiny.inputs()
    reference = load(tiny.model, folder / "plan.json", weights)(x)
    assert_close(load(tiny.Tiny(), folder, weights)(x), reference, tol=1e-6)
    assert_close(load(tiny.model, Plan.load(folder / "plan.json"), weights)(x), reference, tol=1e-6)
    with pytest.raises(SluiceError, match="cannot read the weights"):
        load(tiny.model, folder)


def test_without_weights_those_of_the_model_are_cut(folder: Path) -> None:
    plan = Plan.load(folder / "plan.json")
    loaded = load(tiny.model, plan)
    expected = rewrite_torch(capture(tiny.model(), tiny.inputs()), plan, tiny.inputs()).eval()
    assert_close(loaded(tiny.inputs()), expected(tiny.inputs()), tol=1e-6)


def test_weights_of_another_plan_are_refused(folder: Path) -> None:
    other, _ = cut(tiny.model(), tiny.inputs(), seed=0)
    save_weights(other, folder / "slim.safetensors")
    with pytest.raises(SluiceError, match=r"does not belong to this plan: 'conv1\.weight' is \(9, 3, 3, 3\) instead"):
        load(tiny.model, folder)


def test_missing_and_additional_tensors_are_refused(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = read_tensors(folder / "slim.safetensors")
    file = folder / "slim.safetensors"
    save_file({n: t for n, t in tensors.items() if n != "fc.bias"}, file)
    with pytest.raises(SluiceError, match=r"'fc\.bias' is missing instead of \(5,\) \(1 differences\)"):
        load(tiny.model, folder)
    save_file({**tensors, "extra": torch.zeros(2)}, file)
    with pytest.raises(SluiceError, match=r"'extra' is \(2,\) instead of absent"):
        load(tiny.model, folder)


def test_a_plan_for_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(SluiceError, match="the plan was made for another model"):
        load(tiny.other_model, folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "slim.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(SluiceError, match="cannot read the weights"):
        load(tiny.model, folder)


def test_keyword_inputs_are_remembered_by_name(tmp_path: Path) -> None:
    model, (x, y) = networks.build("tied")
    slim, plan = cut(model, {"x": x, "y": y})
    assert plan.inputs == (InputSpec((3, 5), "float32", "x"), InputSpec((3, 5), "float32", "y"))
    assert Plan.from_json(plan.to_json()).inputs == plan.inputs
    plan.save(tmp_path / "plan.json")
    save_weights(slim, tmp_path / "slim.safetensors")
    loaded = load(networks.NETWORKS["tied"][0], tmp_path)
    assert_close(loaded(x=x, y=y), slim(x=x, y=y), tol=1e-6)


class Colliding(nn.Module):
    """Parts called as attributes of an fx.GraphModule, and as ours."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("meta", nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)))
        self.add_module("meta_", nn.Linear(7, 6))
        self.add_module("gates", nn.Linear(6, 5))
        self.graph = nn.Parameter(torch.rand(5))
        self.register_buffer("code", torch.rand(5))
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.meta_(torch.relu(self.meta(x)))
        return self.last(torch.relu(self.gates(torch.relu(x))) * self.graph + self.code)


def test_parts_may_have_any_name(tmp_path: Path) -> None:
    model, x = Colliding().eval(), torch.randn(3, 5)
    gated = insert_gates(model, x)
    groups = {group.name: group.size for group in gated.meta["space"].analysis.groups}
    assert groups == {"meta__.0": 7, "meta_": 6, "gates_": 5}
    kept = {name: list(range(1, size)) for name, size in groups.items()}
    assert_close(gated.eval()(x), model(x), tol=1e-5)
    plan = make_plan(gated.meta["space"].analysis, kept, input_specs(strip_gates(gated)))
    slim = rewrite_torch(close_gates(gated, kept), plan, x)
    plan.save(tmp_path / "plan.json")
    save_weights(slim, tmp_path / "slim.safetensors")
    loaded = load(Colliding, tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert_close(loaded(x), slim.eval()(x), tol=1e-6)
    again = load(Colliding, tmp_path)
    again.load_state_dict(loaded.state_dict())
    assert [d.name for d in to_onnx(loaded, x).graph.initializer if d.name.startswith("meta__")]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.b(torch.relu(self.a(batch["x"])))


def test_models_without_plain_tensors_need_example_inputs(tmp_path: Path) -> None:
    given = ({"x": torch.randn(3, 5)},)
    slim, plan = cut(Nested(), given)
    assert plan.inputs == ()
    plan.save(tmp_path / "plan.json")
    save_weights(slim, tmp_path / "slim.safetensors")
    with pytest.raises(SluiceError, match="pass example_inputs"):
        load(Nested, tmp_path)
    loaded = load(Nested, tmp_path, example_inputs=given)
    assert_close(loaded(*given), slim(*given), tol=1e-6)


def test_inputs_are_remembered() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc1, self.fc2 = nn.Embedding(11, 6), nn.Linear(6, 7), nn.Linear(7, 3)

        def forward(self, words: Tensor, scale: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(self.table(words).mean(1) * scale)))

    gm = capture(Lookup(), (torch.ones(2, 5, dtype=torch.int64), torch.rand(2, 1)))
    specs = input_specs(gm)
    assert specs == (InputSpec((2, 5), "int64"), InputSpec((2, 1), "float32"))
    words, scale = example_inputs_of(Plan({}, (), specs))
    assert (words.dtype, tuple(words.shape)) == (torch.int64, (2, 5)) and bool((words == 1).all())
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (2, 1))
