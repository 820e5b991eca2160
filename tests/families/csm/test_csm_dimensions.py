"""The released dimensions, on the meta device: how large the model and the adapters are, without a byte of weights."""

from __future__ import annotations

import pytest

from csm_cases import family_on
from speechtune.cli import main
from speechtune.config import LoraSettings, shipped_recipes
from speechtune.families import create_family, load_config
from speechtune.families.csm.family import RELEASED_MODEL, CsmFamily
from speechtune.lora.apply import apply_lora, count_by_component, matching_modules

ATTENTION = ((2048, 2048), (2048, 512), (2048, 512), (2048, 2048))
FFN = ((2048, 8192), (2048, 8192), (8192, 2048))
DEPTH_ATTENTION = ((1024, 1024), (1024, 256), (1024, 256), (1024, 1024))
DEPTH_FFN = ((1024, 8192), (1024, 8192), (8192, 1024))
TOTAL = 1_632_100_161
RECIPE = shipped_recipes()["csm_1b_lora"]


def lora_size(rank: int, backbone: tuple[tuple[int, int], ...], depth: tuple[tuple[int, int], ...] = ()) -> int:
    """Parameters of LoRA: rank times (inputs + outputs) of each linear layer, in 16 and in 4 layers."""
    return rank * sum(layers * sum(map(sum, shapes)) for layers, shapes in ((16, backbone), (4, depth)))


@pytest.fixture(scope="module")
def released() -> CsmFamily:
    """The family on the released model; its dimensions are known without the hub."""
    return family_on(RELEASED_MODEL)  # type: ignore[arg-type]


def test_released_dimensions(released: CsmFamily) -> None:
    """1.632 B parameters, the codec's 79.3 M among them; every part counts once, the tied table too."""
    model = released.skeleton()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == TOTAL
    rows = {row.component: row.total for row in count_by_component(model, released)}
    assert sum(rows.values()) == TOTAL
    millions = {name: round(total / 1e6, 1) for name, total in rows.items()}
    assert millions == {
        "backbone": 973.1,
        "text embeddings": 262.7,
        "audio embeddings": 134.4,
        "depth decoder": 113.3,  # layers 111.2, projector 2.1
        "codec": 79.3,
        "heads": 69.3,  # 65.1 of the depth decoder, 4.2 of the backbone
    }
    assert (released.model_config.max_position_embeddings, released.model_config.num_codebooks) == (2048, 32)


def test_rotary_embeddings_are_scaled(released: CsmFamily) -> None:
    """Unlike the class's defaults: those of the conversion script, for either decoder."""
    config = released.model_config
    backbone, depth = config.rope_parameters, config.depth_decoder_config.rope_parameters  # type: ignore[union-attr]
    keys = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    assert [backbone[key] for key in keys] == ["llama3", 32, 0.125, 0.5, 1024]  # type: ignore[index]
    assert [depth[key] for key in keys] == ["llama3", 32, 0.001953125, 0.0078125, 16]
    assert backbone["rope_theta"] == depth["rope_theta"] == 500_000  # type: ignore[index]


@pytest.mark.parametrize(
    ("targets", "size", "millions"),
    [
        ("default", lora_size(16, (*ATTENTION, *FFN), (*DEPTH_ATTENTION, *DEPTH_FFN)), 13.5),
        ("backbone+depth", lora_size(16, (*ATTENTION, *FFN), (*DEPTH_ATTENTION, *DEPTH_FFN)), 13.5),
        ("all", lora_size(16, (*ATTENTION, *FFN), (*DEPTH_ATTENTION, *DEPTH_FFN)), 13.5),
        ("backbone", lora_size(16, (*ATTENTION, *FFN)), 11.3),
        ("attention", lora_size(16, ATTENTION, DEPTH_ATTENTION), 3.8),
    ],
)
def test_adapter_sizes(released: CsmFamily, targets: str, size: int, millions: float) -> None:
    """Rank 16 on the released dimensions; no preset names a layer of the codec."""
    model = apply_lora(released.skeleton(), released, LoraSettings(rank=16, targets=targets), seed=0)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == size and round(size / 1e6, 1) == millions
    assert not any("codec_model" in name for name in trained)


def test_recipe_prints_its_adapter_by_component(capsys: pytest.CaptureFixture[str]) -> None:
    """`speechtune train csm_1b_lora --dry-run`, without a weight and without the hub."""
    family = create_family(load_config(RECIPE))
    assert len(matching_modules(family.skeleton(), family.lora_presets["backbone+depth"])) == 7 * (16 + 4)
    assert main(["train", "csm_1b_lora", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    shown = {
        cells[1]: cells[2:4] for line in (out + err).splitlines() if len(cells := line.replace("┃", "│").split("│")) > 3
    }
    rows = {name.strip(): [cell.strip() for cell in cells] for name, cells in shown.items()}
    layer = sum(inputs * outputs for inputs, outputs in (*ATTENTION, *FFN)) + 2 * 2048
    assert rows["backbone"] == [f"{16 * layer + 2048:,}", f"{lora_size(16, (*ATTENTION, *FFN)):,}"]
    assert rows["depth decoder"][1] == f"{lora_size(16, (), (*DEPTH_ATTENTION, *DEPTH_FFN)):,}"
    assert rows["codec"][1] == rows["audio embeddings"][1] == "0"
    assert rows["all"][0] == f"{TOTAL:,}"
