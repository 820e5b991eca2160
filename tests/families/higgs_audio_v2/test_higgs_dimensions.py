"""The released dimensions, on the meta device: how large the model and the adapters are, without a byte of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from speechtune.config import LoraSettings, shipped_recipes
from speechtune.families import build_config, create_family, load_config
from speechtune.families.higgs_audio_v2.family import RELEASED_MODEL, HiggsAudioV2Family
from speechtune.family import Family
from speechtune.lora.apply import apply_lora, count_by_component, matching_modules, target_pattern

RECIPES = [path for name, path in shipped_recipes().items() if name.startswith("higgs_")]
TEXT_HEAD = 128_256 * 3072


@pytest.fixture
def released() -> HiggsAudioV2Family:
    """The family on the released 3B model; its dimensions are known without the hub."""
    values = {"family": "higgs_audio_v2", "model": {"path": RELEASED_MODEL}}
    return HiggsAudioV2Family(build_config(values, "test"))


def trained_by(family: Family, settings: LoraSettings) -> int:
    """Trainable parameters of a LoRA on the skeleton."""
    model = apply_lora(family.skeleton(), family, settings, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def lora_size(rank: int, *shapes: tuple[int, int], layers: int = 28) -> int:
    """Parameters of LoRA: rank times (inputs + outputs) of each linear layer."""
    return layers * sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def test_released_dimensions(released: HiggsAudioV2Family) -> None:
    """5.377 B parameters, 5.771 B with the text head; an audio vocabulary of 8 x (1024 codes and two stream ids)."""
    model = released.skeleton()
    assert all(parameter.is_meta for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (total - TEXT_HEAD, total) == (5_377_281_024, 5_771_283_456)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert released.model_config.dtype == torch.bfloat16
    assert shapes["audio_lm_head.weight"] == (8 * 1026, 3072)
    assert shapes["model.layers.27.self_attn.k_proj.weight"] == (8 * 128, 3072)
    assert shapes["model.layers.27.audio_mlp.down_proj.weight"] == (3072, 8192)


ATTENTION = ((3072, 3072), (3072, 1024), (3072, 1024), (3072, 3072))
FFN = ((3072, 8192), (3072, 8192), (8192, 3072))
BY_NAME = r".*\.(q|k|v|o|gate|up|down)_proj"
"""Bare layer names, as in many LoRA recipes: they match both FFNs of every layer."""


@pytest.mark.parametrize(
    ("targets", "shapes", "millions"),
    [
        ("attention", ATTENTION, 9.2),
        ("attention+audio_ffn", (*ATTENTION, *FFN), 24.3),
        ("default", (*ATTENTION, *FFN), 24.3),
        ("all", (*ATTENTION, *FFN, *FFN), 39.5),
        (BY_NAME, (*ATTENTION, *FFN, *FFN), 39.5),
    ],
)
def test_adapter_sizes(
    released: HiggsAudioV2Family, targets: str, shapes: tuple[tuple[int, int], ...], millions: float
) -> None:
    """Rank 16 on the released dimensions; what a preset says is what it trains."""
    trained = trained_by(released, LoraSettings(rank=16, targets=targets))
    assert trained == lora_size(16, *shapes)
    assert round(trained / 1e6, 1) == millions


def test_parts_add_up(released: HiggsAudioV2Family) -> None:
    """The table shown before training counts every parameter once, and the adapter beside the base."""
    model = apply_lora(released.skeleton(), released, LoraSettings(rank=16), seed=0)
    rows = {row.component: row for row in count_by_component(model, released)}
    assert sum(row.total for row in rows.values()) == 5_771_283_456
    assert {component for component, row in rows.items() if row.trainable} == {"attention", "audio FFN"}
    assert rows["audio FFN"].total == rows["text FFN"].total == 28 * 3 * 3072 * 8192


def test_there_are_recipes() -> None:
    """The test below must not pass for want of files."""
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_its_model(recipe: Path) -> None:
    """Every shipped recipe loads, and its LoRA targets exist in the model it names."""
    config = load_config(recipe)
    family = create_family(config)
    skeleton: nn.Module = family.skeleton()
    if config.lora.enabled:
        names = matching_modules(skeleton, target_pattern(family, config.lora))
        assert len(names) % 28 == 0 and len(names) >= 4 * 28
