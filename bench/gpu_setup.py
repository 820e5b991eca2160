"""What `bench/gpu.py` measures: models of released dimensions with random weights, made-up samples, the peer's step.

Shapes: S sequence positions, R audio rows, K codebooks, F frames, T log-mel frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import HiggsAudioV2Config, Phi4MultimodalConfig

from speechtune.families import build_config, create_family
from speechtune.families.higgs_audio_v2.layout import delay_rows, pad_inputs, target_arrays
from speechtune.families.layers.decoder import make_fast
from speechtune.families.layers.kernels import choose_kernels
from speechtune.families.layers.ops import IGNORE
from speechtune.family import Family
from speechtune.lora.apply import apply_lora, plain_model
from speechtune.precision import PrecisionPlan
from speechtune.training.batching import cut_by_tokens
from speechtune.types import Encoded

RELEASED = {
    "higgs_audio_v2": "bosonai/higgs-audio-v2-generation-3B-base",
    "phi4_multimodal": "microsoft/Phi-4-multimodal-instruct",
}
SHORTEST, LONGEST = 100, 2000
TEXT_IDS = 10_000  # ids below this are plain text in both vocabularies


def make_family(name: str, *, tiny: bool, packing: bool, fast: bool, kernels: str = "torch") -> Any:
    """The family of a released model, its dimensions scaled down if `tiny`; no file is read."""
    values = {
        "family": name,
        "model": {"path": RELEASED[name]},
        "batch": {"packing": packing},
        "speed": {"fast_forward": fast, "liger": kernels == "liger", "compile": kernels == "compiled"},
    }
    family = cast(Any, create_family(build_config(values, "bench")))
    if tiny:
        family.model_config = TINY[name]()
    return family


def tiny_higgs() -> HiggsAudioV2Config:
    """Two layers of width 64 with the released vocabularies."""
    return HiggsAudioV2Config(
        codebook_size=1026,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


def tiny_phi4() -> Phi4MultimodalConfig:
    """Two layers of width 64, a small speech encoder and hardly any vision, with the released vocabulary."""
    width = 64
    audio = {"hidden_size": width, "intermediate_size": 96, "num_blocks": 2, "num_attention_heads": 4}
    audio |= {"nemo_conv_channels": 16, "ext_pw_out_channel": width, "depthwise_separable_out_channel": width}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Phi4MultimodalConfig(
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        audio_config=audio | {"bias_max_distance": 500},
        vision_config=vision | {"image_size": 28, "crop_size": 28},
    )


TINY: dict[str, Callable[[], Any]] = {"higgs_audio_v2": tiny_higgs, "phi4_multimodal": tiny_phi4}


def make_model(family: Family, plan: PrecisionPlan, targets: str, seed: int = 0) -> nn.Module:
    """A model with random weights made on the plan's device, and a fresh LoRA on it, in training mode.

    All of it is made, Phi-4's vision encoder too, so that the memory is what a run takes.
    """
    model = cast(Any, family.skeleton())
    for parameter in model.parameters():  # not `model.to`, which would round the rotary frequencies too
        parameter.data = parameter.data.to(plan.base_dtype)
    model = model.to_empty(device=plan.device)
    model.tie_weights()
    torch.manual_seed(seed)
    model.initialize_weights()
    config = cast(Any, family).config
    if config.speed.fast_forward:
        model = make_fast(model, cast(Any, family).fast_layers, choose_kernels(config.speed, plan.device))
    settings = config.lora.model_copy(update={"targets": targets, "rank": 16})
    return apply_lora(model, family, settings, seed).train()


def make_lengths(kind: str, budget: int, seed: int = 0) -> list[int]:
    """Positions of each sample of about four batches: drawn evenly from 100 to 2000 ("mixed"), or all 500 ("equal")."""
    rng, lengths = np.random.default_rng(seed), []
    while sum(lengths) < 4 * budget:
        lengths.append(int(rng.integers(SHORTEST, LONGEST + 1)) if kind == "mixed" else 500)
    return [min(length, budget) for length in lengths]


def make_samples(family: Any, lengths: Sequence[int], seed: int = 0) -> list[Encoded]:
    """Samples as the family's `encode` makes them, with random content."""
    rng = np.random.default_rng(seed)
    return [SAMPLES[family.name](family, f"sample-{i}", length, rng) for i, length in enumerate(lengths)]


def higgs_sample(family: Any, name: str, length: int, rng: np.random.Generator) -> Encoded:
    """A fifth text, two fifths reference, the rest target."""
    config = family.model_config
    num_codebooks, fillers = config.num_codebooks, config.num_codebooks - 1
    text = max(24, length // 5)
    reference = (length - text) * 2 // 5
    sizes = [reference - num_codebooks - 1, length - text - reference - num_codebooks - 1]  # frames
    ids: list[int] = []
    rows = []
    for num_frames, before in zip(sizes, (text // 2, text - text // 2 - 2), strict=True):
        codes_FK = rng.integers(0, config.codebook_size - 2, (num_frames, num_codebooks))
        rows_RK = delay_rows(codes_FK, config.audio_stream_bos_id, config.audio_stream_eos_id)
        ids += rng.integers(0, TEXT_IDS, before).tolist()
        ids += [config.audio_token_id] * (len(rows_RK) - fillers) + [config.audio_delay_token_id] * fillers
        rows.append(rows_RK)
    ids += rng.integers(0, TEXT_IDS, 2).tolist()
    arrays = target_arrays(np.asarray(ids, np.int32), np.concatenate(rows), sizes[-1], 2)
    return Encoded(name, arrays, len(ids), sizes[-1] / 25)


def phi4_sample(family: Any, name: str, length: int, rng: np.random.Generator) -> Encoded:
    """A third audio (40 s at most), a quarter answer, the rest prompt."""
    audio, answer = min(500, length // 3), length // 4
    num_frames = audio * family.model_config.audio_config.time_reduction
    prompt = rng.integers(0, TEXT_IDS, length - answer)
    prompt[2 : 2 + audio] = family.audio_id
    targets = rng.integers(0, TEXT_IDS, answer)
    task = family.heads[int(name.rpartition("-")[2]) % len(family.heads)]
    arrays = {
        "input_ids": np.concatenate([prompt, targets]).astype(np.int32),
        "features": rng.standard_normal((num_frames, 80)).astype(np.float32),
        f"{task}_positions": np.arange(len(prompt) - 1, length - 1),
        f"{task}_targets": targets,
    }
    return Encoded(name, arrays, length, num_frames / 100)


SAMPLES = {"higgs_audio_v2": higgs_sample, "phi4_multimodal": phi4_sample}


def cut(samples: Sequence[Encoded], budget: int, *, packed: bool) -> list[list[Encoded]]:
    """Micro-batches of at most `budget` positions, cut as the toolkit cuts a step."""
    lengths = np.asarray([sample.num_tokens for sample in samples])
    parts = cut_by_tokens(range(len(samples)), lengths, budget, 1, packed=packed)
    return [[samples[i] for i in part] for part in parts]


def peer_inputs(family: Any, items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """What plain transformers takes for some samples: padded tensors, and labels of every position."""
    return PEER[family.name](family, items)


def higgs_peer(family: Any, items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Labels of the audio rows; without a text head, as a plain load has it."""
    prompts = [(item.arrays["input_ids"], item.arrays["audio_rows"]) for item in items]
    inputs = pad_inputs(prompts, family.pad_id, family.model_config.audio_stream_eos_id, left=False)
    labels_BRK = torch.full_like(inputs["audio_input_ids"], IGNORE)
    for labels_RK, item in zip(labels_BRK, items, strict=True):
        targets_RK = torch.from_numpy(item.arrays["audio_targets"].astype(np.int64))
        end = len(item.arrays["audio_rows"])
        labels_RK[end - len(targets_RK) : end] = targets_RK
    return inputs | {"audio_labels": labels_BRK}


def phi4_peer(family: Any, items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Labels of the answers, features with their mask."""
    padded = family.collate(items).inputs
    labels_BS = torch.full_like(padded["input_ids"], IGNORE)
    for labels_S, item in zip(labels_BS, items, strict=True):
        task = next(name.removesuffix("_targets") for name in item.arrays if name.endswith("_targets"))
        places = torch.from_numpy(item.arrays[f"{task}_positions"]) + 1
        labels_S[places] = torch.from_numpy(item.arrays[f"{task}_targets"])
    lengths_B = padded["feature_lengths"]
    frames = torch.arange(padded["features"].shape[1])
    return {
        "input_ids": padded["input_ids"],
        "attention_mask": padded["attention_mask"],
        "audio_input_features": padded["features"],
        "audio_attention_mask": frames < lengths_B[:, None],
        "audio_embed_sizes": torch.tensor([-(-int(n) // 8) for n in lengths_B]),
        "labels": labels_BS,
    }


PEER = {"higgs_audio_v2": higgs_peer, "phi4_multimodal": phi4_peer}


def peer_loss(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The native class's own loss, its heads over every position."""
    base = cast(Any, plain_model(model))
    if hasattr(base, "text_lm_head"):
        base.text_lm_head = None
    return base(**inputs, use_cache=False).loss
