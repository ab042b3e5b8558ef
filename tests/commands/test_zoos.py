"""Networks of other packages by name. The packages are made up here: folders with what is asked of the real ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sluice.cli import main
from sluice.commands import zoos
from sluice.commands.specs import dense_in, inputs_of, model_of
from sluice.core.errors import SluiceError

TIMM = """
from torch import nn
from types import SimpleNamespace as Some
def is_model(name): return name == "tiny"
def list_models(): return ["tiny", "large"]
def create_model(name, width=4, img_size=8): return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 2, 3))
models = Some(get_pretrained_cfg=lambda name: Some(input_size=(3, 8, 9)))
"""
TORCHVISION = """
import torch
from types import SimpleNamespace as Some
from torch import nn
@torch.library.register_fake("torchvision::of_a_test")
def of_a_test(x): return x
def build(weights=None, weights_backbone="downloaded"):
    assert weights is None and weights_backbone is None
    return nn.Conv2d(3, 4, 3)
keywords = {"crop_size": [8]}
models = Some(
    list_models=lambda: ["tiny"],
    get_model=lambda name, **given: build(**given),
    get_model_builder=lambda name: build,
    get_model_weights=lambda name: Some(DEFAULT=Some(transforms=Some(keywords=keywords))),
)
"""
TRANSFORMERS = """
import json, os
from types import SimpleNamespace as Some
from torch import nn
class TinyConfig:
    architectures = None
    def __init__(self, width=6, vocab_size=20, use_cache=True):
        self.width, self.vocab_size, self.use_cache = width, vocab_size, use_cache
class Tiny(nn.Module):
    main_input_name = "input_ids"
    def __init__(self, config, how="sdpa"):
        super().__init__()
        self.config, self.how = config, how
        self.table, self.up = nn.Embedding(config.vocab_size, config.width), nn.Linear(config.width, 9)
    def forward(self, input_ids, attention_mask=None): return Some(logits=self.up(self.table(input_ids)))
    @classmethod
    def _from_config(cls, config, attn_implementation="sdpa"): return cls(config, attn_implementation)
class TinyForMaskedLM(Tiny): pass
class AutoModel:
    _model_mapping = {TinyConfig: (Tiny, None)}
    @classmethod
    def from_config(cls, config, **more): return Tiny._from_config(config, **more)
class AutoConfig:
    @classmethod
    def from_pretrained(cls, folder, local_files_only):
        assert local_files_only
        with open(os.path.join(folder, "config.json")) as file: given = json.load(file)
        config = TinyConfig(given["width"])
        config.architectures = given["architectures"]
        return config
"""
DIFFUSERS = """
from torch import nn
class UNet(nn.Module):
    load_config = None
    def __init__(self, sample_size=8, in_channels=4, cross_attention_dim=6):
        super().__init__()
        self.one, self.two = nn.Conv2d(in_channels, 5, 1), nn.Linear(cross_attention_dim, 5)
    def forward(self, sample, timestep, encoder_hidden_states):
        return self.one(sample) + self.two(encoder_hidden_states).mean(1)[..., None, None] + timestep.view(-1, 1, 1, 1)
"""
ULTRALYTICS = """
from torch import nn
class Head(nn.Conv2d):
    export = dynamic = False
    format = None
class DetectionModel(nn.Sequential):
    def __init__(self, config, verbose=True, nc=80): super().__init__(Head(3, nc, 1))
ClassificationModel = SegmentationModel = PoseModel = OBBModel = DetectionModel
def yaml_model_load(name):
    if name != "yolo0n.yaml": raise FileNotFoundError(name)
    return {"head": "detect"}
def guess_model_task(config): return config["head"]
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Packages that can be imported in the test, and no others of those that names are read for."""
    names = {"timm", "torchvision", "transformers", "diffusers", "ultralytics"}
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**files: str) -> None:
        for module in [m for m in sys.modules if m.partition(".")[0] in names]:
            monkeypatch.delitem(sys.modules, module)
        for name in names - {file.partition("_")[0] for file in files}:
            monkeypatch.setitem(sys.modules, name, None)
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)

    yield make  # type: ignore[misc]
    for module in [m for m in sys.modules if m.partition(".")[0] in names]:
        sys.modules.pop(module)


def test_a_missing_package_is_told_with_its_command(install: Install) -> None:
    install()
    for zoo in zoos.ZOOS:
        package = zoos.PACKAGES.get(zoo, zoo)
        with pytest.raises(SluiceError, match=rf"needs the package '{package}'.*pip install 'torch-sluice\[{zoo}\]'"):
            model_of(f"{zoo}:any")


def test_timm(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(timm=TIMM)
    model, again = model_of("timm:tiny?width=5"), model_of("timm:tiny?width=5")
    assert torch.equal(model[0].weight, again[0].weight) and model[0].weight.shape[0] == 5  # type: ignore[index]
    assert inputs_of("timm:tiny", None, 2).shape == (2, 3, 8, 9)  # type: ignore[union-attr]
    assert inputs_of("timm:tiny?img_size=12", None, 2).shape == (2, 3, 12, 12)  # type: ignore[union-attr]
    assert inputs_of("timm:tiny", (3, 7, 7), 1).shape == (1, 3, 7, 7)  # type: ignore[union-attr]
    with pytest.raises(SluiceError, match="timm has no network 'tinny'; it has tiny"):
        model_of("timm:tinny")
    with pytest.raises(SluiceError, match=r"TypeError: .*depth.*it is called with depth"):
        model_of("timm:tiny?depth=3")
    assert main(["inspect", "timm:tiny?width=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"]["0"]["size"] == 7


def test_torchvision_built_for_another_torch(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """It describes operators that only its own library brings; no backbone is downloaded."""
    monkeypatch.setattr(zoos, "OPERATORS", {"of_a_test": "(Tensor x) -> Tensor"})
    install(torchvision=TORCHVISION)
    assert isinstance(model_of("torchvision:tiny"), nn.Conv2d)
    assert inputs_of("torchvision:tiny", None, 2).shape == (2, 3, 8, 8)  # type: ignore[union-attr]


def test_transformers(install: Install, tmp_path: Path) -> None:
    install(transformers=TRANSFORMERS)
    model = model_of("hf:TinyConfig?width=7&attn_implementation=eager")
    assert model.up.in_features == 7 and model.how == "eager" and not model.config.use_cache  # type: ignore[union-attr]
    found = inputs_of("hf:TinyConfig", None, 2)
    assert isinstance(found, dict) and found["input_ids"].shape == found["attention_mask"].shape == (2, 32)
    assert int(found["input_ids"].min()) >= 3 and int(found["input_ids"].max()) < 20
    assert inputs_of("hf:TinyConfig", (9,), 2)["input_ids"].shape == (2, 9)  # type: ignore[index]
    assert type(model_of("hf:TinyConfig?architecture=TinyForMaskedLM")).__name__ == "TinyForMaskedLM"
    assert model_of("hf:TinyConfig?outputs=logits")(**found).shape == (2, 32, 9)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text('{"width": 11, "architectures": ["TinyForMaskedLM"]}')
    saved = model_of(f"hf:{tmp_path / 'saved'}")
    assert type(saved).__name__ == "TinyForMaskedLM" and saved.up.in_features == 11  # type: ignore[union-attr]
    with pytest.raises(SluiceError, match="neither a folder nor a configuration of transformers"):
        model_of("hf:Tiny")
    with pytest.raises(SluiceError, match="no class 'Other'"):
        model_of("hf:TinyConfig?architecture=Other")


def test_diffusers_and_ultralytics(install: Install) -> None:
    install(diffusers=DIFFUSERS, ultralytics="", ultralytics_nn="")
    found = inputs_of("diffusers:UNet?cross_attention_dim=5", None, 2)
    assert isinstance(found, dict)
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    assert shapes == {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 32, 5), "timestep": (2,)}
    model_of("diffusers:UNet?cross_attention_dim=5")(**found)
    with pytest.raises(SluiceError, match="diffusers has no network 'Net'"):
        model_of("diffusers:Net")


def test_ultralytics(install: Install, tmp_path: Path) -> None:
    install(ultralytics="")
    folder = tmp_path / "ultralytics" / "nn"
    folder.mkdir(parents=True)
    (tmp_path / "ultralytics.py").rename(tmp_path / "ultralytics" / "__init__.py")
    (folder / "__init__.py").touch()
    (folder / "tasks.py").write_text(ULTRALYTICS)
    head = model_of("ultralytics:yolo0n?nc=3")[0]  # type: ignore[index]
    assert head.out_channels == 3 and head.export and head.format == "onnx"
    assert inputs_of("ultralytics:yolo0n", None, 1).shape == (1, 3, 640, 640)  # type: ignore[union-attr]
    with pytest.raises(SluiceError, match="ultralytics has no network 'yolo1n'"):
        model_of("ultralytics:yolo1n")


def test_weights_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, path = "tests.commands.test_zoos:tied", str(tmp_path / "w.safetensors")
    wanted = tied()
    tensors = {name: tensor for name, tensor in wanted.state_dict().items() if name != "head.weight"}

    def refused(message: str) -> None:
        with pytest.raises(SluiceError, match=message):
            model_of(spec, path)

    refused("cannot read the weights .*give a safetensors file")
    save_file(tensors, path)
    made = model_of(spec, path)
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())
    assert main(["inspect", spec, "--shape", "6", "--weights", path]) == 0
    save_file({**tensors, "up.weight": torch.zeros(2, 2)}, path)
    refused("size mismatch for up.weight")
    save_file({"up.weight": tensors["up.weight"]}, path)
    refused("it lacks '(table|head).weight'")
    save_file({**tensors, "more": torch.zeros(1)}, path)
    refused("it has also 'more'")
    with pytest.raises(SluiceError, match="--weights is for a factory"):
        dense_in("dense.onnx", None, (), path)
    capsys.readouterr()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.table, self.head = nn.Linear(6, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x).relu()
        return self.head(y) + self.table(y)


def tied() -> nn.Module:
    return Tied()


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from sluice.models import EXAMPLE_SHAPES

    assert main(["models"]) == 0
    said = capsys.readouterr().out
    assert "sluice:resnet50  3,224,224" in said and "timm:NAME" in said
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sluice"].keys() == EXAMPLE_SHAPES.keys()
