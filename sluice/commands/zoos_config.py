"""Networks that a configuration describes, of transformers and diffusers, and the inputs that it speaks of.

The rules of `sluice.commands.zoos` hold: random weights, a context of `TOKENS` tokens, no cache of keys and values.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from sluice.core.errors import SluiceError

if TYPE_CHECKING:
    import torch
    from torch import nn

    Inputs = torch.Tensor | dict[str, torch.Tensor]

__all__ = ["diffusers_inputs", "diffusers_network", "hf", "hf_inputs", "sides"]

TOKENS = 32
SECOND = 16_000  # samples of audio


def hf(transformers: Any, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    arguments = dict(arguments)
    outputs = arguments.pop("outputs", None)
    config, architecture, more = _parts(transformers, name, arguments)
    if architecture is None:
        made: nn.Module = transformers.AutoModel.from_config(config, **more)
    else:
        made = architecture._from_config(config, **more)
    return made if outputs is None else _returning(made, outputs)


def _returning(model: nn.Module, output: str) -> nn.Module:
    """The model itself, with a forward() that returns one of its outputs alone."""
    kind = type(model)

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(kind.forward(self, *args, **kwargs), output)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return model


def _parts(transformers: Any, name: str, arguments: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The configuration, the class that it names, if any, and how attention is written."""
    given = {"use_cache": False, **arguments}
    architecture = given.pop("architecture", None)
    given.pop("outputs", None)
    more = {"attn_implementation": given.pop("attn_implementation")} if "attn_implementation" in given else {}
    if os.path.isdir(name):
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        for key, value in given.items():
            setattr(config, key, value)
        architecture = architecture or next(iter(config.architectures or ()), None)
    else:
        kind = getattr(transformers, name, None)
        if kind is None or not name.endswith("Config"):
            raise SluiceError(
                f"'hf:{name}' is neither a folder nor a configuration of transformers; write hf:BertConfig or hf:./DIR"
            )
        config = kind(**given)
    if architecture is not None and not hasattr(transformers, architecture):
        raise SluiceError(f"transformers has no class {architecture!r}; write architecture=BertForMaskedLM")
    return config, architecture and getattr(transformers, architecture), more


def hf_inputs(
    transformers: Any,
    name: str,
    arguments: Mapping[str, Any],
    shape: tuple[int, ...] | None,
    batch: int,
    generator: torch.Generator,
) -> Inputs:
    import torch

    config, kind, _ = _parts(transformers, name, arguments)
    kind = kind or transformers.AutoModel._model_mapping[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    main, taken = kind.main_input_name, inspect.signature(kind.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, text.vocab_size, (batch, length), generator=generator)

    found: dict[str, torch.Tensor] = {}
    if main == "input_ids":
        length = shape[0] if shape else min(TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS)
        found[main] = tokens(length)
        if "attention_mask" in taken:
            found["attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
    else:
        found[main] = torch.randn(batch, *(shape or _shape(config, main)), generator=generator)
    if "decoder_input_ids" in taken:
        found["decoder_input_ids"] = tokens(TOKENS // 2)
    if main == "input_ids" and "pixel_values" in taken:
        vision = getattr(config, "vision_config", config)
        found["pixel_values"] = torch.randn(batch, *_shape(vision, "pixel_values"), generator=generator)
    return found


def _shape(config: Any, main: str) -> tuple[int, ...]:
    """Of images, spectrograms and waves."""
    vision = getattr(config, "vision_config", config)
    if main == "pixel_values":
        return (getattr(vision, "num_channels", 3), *sides(getattr(vision, "image_size", 224)))
    if main == "input_features":
        return (config.num_mel_bins, 2 * config.max_source_positions)
    if main == "input_values" and hasattr(config, "max_length"):
        return (config.max_length, config.num_mel_bins)
    if main == "input_values":
        return (SECOND,)
    raise SluiceError(f"the configuration does not tell {main!r}; give every argument of forward() by --input")


def diffusers_network(diffusers: Any, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    kind = getattr(diffusers, name, None)
    if not inspect.isclass(kind) or not hasattr(kind, "load_config"):
        raise SluiceError(f"diffusers has no network {name!r}; write the name of its class, UNet2DModel")
    return cast("nn.Module", kind(**arguments))


def diffusers_inputs(
    diffusers: Any,
    name: str,
    arguments: Mapping[str, Any],
    shape: tuple[int, ...] | None,
    batch: int,
    generator: torch.Generator,
) -> Inputs:
    import torch

    kind = getattr(diffusers, name)
    defaults = {k: p.default for k, p in inspect.signature(kind.__init__).parameters.items()}
    config, taken = {**defaults, **arguments}, inspect.signature(kind.forward).parameters
    size = config.get("sample_size") or 64
    found = {next(iter(n for n in taken if n != "self")): (config.get("in_channels", 3), *sides(size))}
    if "encoder_hidden_states" in taken and config.get("cross_attention_dim"):
        found["encoder_hidden_states"] = (TOKENS, config["cross_attention_dim"])
    first = next(iter(found))
    made = {
        key: torch.randn(batch, *((shape if key == first else None) or s), generator=generator)
        for key, s in found.items()
    }
    if "timestep" in taken:
        made["timestep"] = torch.randint(0, 1000, (batch,), generator=generator)
    if "class_labels" in taken and config.get("num_embeds_ada_norm"):
        made["class_labels"] = torch.randint(0, config["num_embeds_ada_norm"], (batch,), generator=generator)
    return made


def sides(size: Any) -> tuple[int, ...]:
    """One number is the side of a square."""
    if isinstance(size, (tuple, list)):
        return tuple(size) * 2 if len(size) == 1 else tuple(size)
    return (math.ceil(size), math.ceil(size))
