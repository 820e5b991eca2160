"""The released dimensions of Phi-4-multimodal, on the meta device: how large the base and its adapters are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from speechtune.commands.train import show_plan
from speechtune.config import LoraSettings, RunConfig
from speechtune.families import build_config, load_config
from speechtune.families.phi4_multimodal.family import RELEASED_MODEL, Phi4MultimodalFamily
from speechtune.lora.apply import apply_lora, count_by_component, matching_modules, target_pattern

BASE = 4_743_988_032
"""With the text head tied to the embedding, counted once."""
EMBEDDING = 200_064 * 3072
LAYERS = 32
WIDTH, HEADS, KEY_VALUE_HEADS, FFN = 3072, 24, 8, 8192
SHAPES = (  # inputs and outputs of the linear layers in each layer of the language model
    (WIDTH, WIDTH + 2 * KEY_VALUE_HEADS * (WIDTH // HEADS)),
    (WIDTH, WIDTH),
    (WIDTH, 2 * FFN),
    (FFN, WIDTH),
)


@pytest.fixture
def released() -> Phi4MultimodalFamily:
    """The family on the released model; its dimensions are known without the hub."""
    return Phi4MultimodalFamily(
        build_config({"family": "phi4_multimodal", "model": {"path": RELEASED_MODEL}}, "released")
    )


def language_lora(rank: int) -> int:
    """Parameters of LoRA on the language model: rank times (inputs + outputs) of each linear layer."""
    return LAYERS * sum(rank * (inputs + outputs) for inputs, outputs in SHAPES)


def trained_by(family: Phi4MultimodalFamily, settings: LoraSettings) -> int:
    """Trainable parameters of a LoRA on the skeleton."""
    model = apply_lora(family.skeleton(), family, settings, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def counts_in(printed: str) -> dict[str, tuple[int, int]]:
    """Part of the model -> (base parameters, trainable), as read from the table that was printed."""
    rows = re.findall(r"│\s*([a-zA-Z ]+?)\s*│\s*([\d,]+)\s*│\s*([\d,]+)", printed)
    return {part: (int(total.replace(",", "")), int(trained.replace(",", ""))) for part, total, trained in rows}


@pytest.mark.parametrize(
    ("recipe", "rank", "trained"), [("paper_r64", 64, 92_274_688), ("pretrained_r320", 320, 461_373_440)]
)
def test_a_dry_run_prints_the_counts_of_the_released_model(
    recipe: str, rank: int, trained: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without weights, data or the hub, though the recipes name a revision there."""
    assert trained == language_lora(rank)
    assert show_plan(load_config(Path(recipe))) == 0
    counts = counts_in(capsys.readouterr().out)
    assert counts.pop("all") == (BASE, trained)
    assert sum(total for total, _ in counts.values()) == BASE
    assert {part for part, (_, number) in counts.items() if number} == {"attention", "FFN"}, (
        "speech and vision are frozen"
    )
    assert counts["embeddings"] == (EMBEDDING, 0)


def test_released_dimensions(released: Phi4MultimodalFamily) -> None:
    model = released.skeleton()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == BASE
    assert sum(row.total for row in count_by_component(model, released)) == BASE
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["model.embed_tokens.weight"] == (200_064, WIDTH)
    assert shapes["model.layers.31.self_attn.qkv_proj.weight"] == (5120, WIDTH)
    assert shapes["model.layers.31.mlp.gate_up_proj.weight"] == (2 * FFN, WIDTH)


@pytest.mark.parametrize(
    ("targets", "trained"), [("default", 92_274_688), ("language", 92_274_688), ("all-linear", 163_627_008)]
)
def test_adapter_sizes(released: Phi4MultimodalFamily, targets: str, trained: int) -> None:
    """Rank 64; `all-linear` is what PEFT would take by that name: the vision tower too, which no gradient reaches."""
    assert trained_by(released, LoraSettings(rank=64, targets=targets)) == trained


def test_presets_grow_by_whole_parts(released: Phi4MultimodalFamily) -> None:
    skeleton = released.skeleton()
    names = {
        preset: set(matching_modules(skeleton, target_pattern(released, LoraSettings(targets=preset))))
        for preset in ("language", "language+audio", "all-linear")
    }
    assert names["language"] < names["language+audio"] < names["all-linear"]
    assert len(names["language"]) == LAYERS * len(SHAPES)
    assert all("audio_embed" in name for name in names["language+audio"] - names["language"])
    assert any("image_embed" in name for name in names["all-linear"])


def test_the_native_revision_is_that_of_the_recipes() -> None:
    """Other revisions may have other dimensions: those are asked for, not assumed."""
    revisions = {load_config(Path(name)).model.revision for name in ("paper_r64", "pretrained_r320")}
    assert revisions == {"refs/pr/70"}
    config: RunConfig = load_config(Path("paper_r64"), ["model.revision=main"])
    assert config.model.revision == "main"
