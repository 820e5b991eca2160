"""The base's language model, with what helps it to learn: tables that know the codec, a head told where to look.

All of that is folded into the native weights or left out when the model is written.

Shapes: K codebooks, V entries, D hidden size, G guided rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from chains import Guided
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, PreTrainedTokenizerFast

from speechtune.families.higgs_audio_v2 import forward
from speechtune.families.higgs_audio_v2.codec_world import PARTS, WorldCodec
from speechtune.families.higgs_audio_v2.forward import FAST_LAYERS, target_states
from speechtune.families.layers.decoder import make_fast
from speechtune.families.layers.ops import IGNORE, Segments, attend
from speechtune.types import Batch

GUIDED_LAYER, TOLD_LAYER = 2, 3
CODEBOOK_WEIGHTS = (2.0, 1.2, 1.2, 0.8, 0.6, 0.5, 0.4, 0.5)
TEXT_WEIGHT, SPOKEN_WEIGHT, GUIDE_WEIGHT = 0.1, 0.25, 1.0


def make_config(tokenizer: PreTrainedTokenizerFast, codec: WorldCodec, hidden: int, layers: int) -> HiggsAudioV2Config:
    """Dimensions and ids."""

    def token(name: str) -> int:
        return cast(int, tokenizer.convert_tokens_to_ids(name))

    size = codec.codebook_size + 2
    return HiggsAudioV2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_codebooks=codec.num_codebooks,
        codebook_size=size,
        audio_stream_bos_id=size - 2,
        audio_stream_eos_id=size - 1,
        bos_token_id=token("<|begin_of_text|>"),
        eos_token_id=token("<|eot_id|>"),
        pad_token_id=token("<|end_of_text|>"),
        audio_token_id=token("<|AUDIO_OUT|>"),
        audio_bos_token_id=token("<|audio_out_bos|>"),
        audio_delay_token_id=token("<|reserved_special_token_6|>"),
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


def entry_features(codec: WorldCodec) -> list[np.ndarray]:
    """Numbers that describe each entry of each codebook, about of variance 1; the two stream ids are zeros."""
    found = []
    for index, entries_VD in enumerate(codec.codebooks):
        if index == 1:  # pitch: bumps along the scale, the shape within the frame, voicing
            log_pitch = entries_VD[:, :PARTS] / 6
            mean = log_pitch.mean(axis=1, keepdims=True)
            bumps = np.exp(-0.5 * ((mean - np.linspace(np.log(70), np.log(350), 12)) / 0.13) ** 2)
            parts = [bumps, (log_pitch - mean) * 4, entries_VD[:, PARTS:] - 0.5, mean - np.log(160)]
        else:
            centred = entries_VD - entries_VD.mean(axis=0) if index == len(codec.codebooks) - 1 else entries_VD
            scaled = centred / np.sqrt(np.square(centred).sum(axis=1).mean())
            parts = [scaled, np.square(scaled).sum(axis=1, keepdims=True) - 1]
        found.append(np.pad(np.concatenate(parts, axis=1), ((0, codec.codebook_size + 2 - len(entries_VD)), (0, 0))))
    return found


def nearest_entries(codec: WorldCodec, count: int = 3) -> list[np.ndarray]:
    """Of each codebook the nearest other entries of each entry, (V, count)."""
    found = []
    for entries_VD in codec.codebooks:
        distances_VV = np.square(entries_VD[:, None] - entries_VD[None]).sum(axis=2)
        np.fill_diagonal(distances_VV, np.inf)
        found.append(distances_VV.argsort(axis=1)[:, :count])
    return found


class KnowsEntries(nn.Module):
    """A table (K * V, D) as a free part and a projection of the entries' features: near entries begin alike."""

    def __init__(self, features: Sequence[np.ndarray], hidden: int, scale: float) -> None:
        super().__init__()
        for index, part in enumerate(features):
            self.register_buffer(f"features_{index}", torch.from_numpy(part.astype(np.float32)), persistent=False)
        self.projections = nn.ParameterList(torch.randn(part.shape[1], hidden) * scale for part in features)

    def known(self, projections: Sequence[torch.Tensor]) -> torch.Tensor:
        """The projected part, (K * V, D)."""
        features = (self.get_buffer(f"features_{index}") for index in range(len(projections)))
        pairs = zip(features, projections, strict=True)
        return torch.cat([part.to(projection) @ projection for part, projection in pairs])

    def forward(self, free: torch.Tensor) -> torch.Tensor:
        """The table."""
        return free + self.known(list(self.projections))


def audio_losses(logits_PO: torch.Tensor, targets_PK: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each codebook, (K,)."""
    logits_NV = logits_PO.float().view(targets_PK.numel(), -1)
    losses_N = functional.cross_entropy(logits_NV, targets_PK.flatten(), ignore_index=IGNORE, reduction="none")
    return losses_N.view(targets_PK.shape).sum(dim=0) / (targets_PK != IGNORE).sum(dim=0)


class SpeakingBase(nn.Module):
    """The native model and the parts of training."""

    def __init__(self, config: HiggsAudioV2Config, features: Sequence[np.ndarray]) -> None:
        super().__init__()
        self.model: Any = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
        depth = cast(int, config.num_hidden_layers)
        for name, weight in self.model.named_parameters():
            if "proj" in name:
                last = (2 * depth) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
                nn.init.normal_(weight, std=0.8 * weight.shape[1] ** -0.5 * last)
        self.embedding = self.model.model.embed_audio_tokens.embed_audio_tokens
        nn.init.normal_(self.model.model.embed_tokens.weight, std=0.7)
        nn.init.normal_(self.embedding.weight, std=0.05)
        nn.init.zeros_(self.model.audio_lm_head.weight)
        nn.init.zeros_(self.model.text_lm_head.weight)
        hidden = cast(int, config.hidden_size)
        self.spoken = nn.Linear(hidden, 2 * cast(int, config.vocab_size))
        parametrize.register_parametrization(self.embedding, "weight", KnowsEntries(features, hidden, 0.35))
        parametrize.register_parametrization(self.model.audio_lm_head, "weight", KnowsEntries(features, hidden, 0.03))
        make_fast(self.model, FAST_LAYERS)
        self.seen: dict[int, Any] = {}
        layers = self.model.model.layers
        layers[GUIDED_LAYER].register_forward_pre_hook(self._keep, with_kwargs=True)
        layers[TOLD_LAYER + 1].register_forward_pre_hook(self._keep, with_kwargs=True)

    def compile_parts(self) -> None:
        """Let torch compile the layers, but for the attention, whose loops depend on the lengths."""
        forward.attend = torch.compiler.disable(attend_in_float32)
        for layer in self.model.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.seen[cast(Any, layer).self_attn.layer_idx] = (*inputs, options["routes"])

    def losses(self, batch: Batch, guided: Guided) -> dict[str, torch.Tensor]:
        """Mean losses: of each codebook, of the text head, of where to look, and of what is spoken."""
        audio_PD, text_PD = target_states(self.model.model, batch)
        means_K = audio_losses(self.model.audio_lm_head(audio_PD), batch.inputs["audio_targets"])
        losses = {f"codebook {k}": mean for k, mean in enumerate(means_K)}
        text_PT = self.model.text_lm_head(text_PD).float()
        losses["text"] = functional.cross_entropy(text_PT, batch.inputs["text_targets"])
        losses["guide"] = self._guide(batch, guided)
        (audio_AD, _), routes = self.seen[TOLD_LAYER + 1]
        rows_G = routes.sorting.places[guided.rows]
        said = self.spoken(functional.rms_norm(audio_AD[rows_G], audio_AD.shape[1:])).float().unflatten(-1, (2, -1))
        losses["spoken"] = functional.cross_entropy(said[:, 0], guided.token)
        losses["spoken next"] = functional.cross_entropy(said[:, 1], guided.next_token)
        self.seen.clear()
        return losses

    def _guide(self, batch: Batch, guided: Guided) -> torch.Tensor:
        """Cross-entropy of the first head's attention at the guided layer."""
        (audio_AD, text_TD), routes = self.seen[GUIDED_LAYER]
        layer: Any = self.model.model.layers[GUIDED_LAYER]
        heads, sorting = layer.self_attn, routes.sorting
        mixed_ND = torch.cat([layer.audio_input_layernorm(audio_AD), layer.input_layernorm(text_TD)])[sorting.places]
        cos_NE, sin_NE = routes.rotation
        query_GE = functional.linear(mixed_ND[guided.rows], heads.q_proj.weight[: heads.head_dim]).float()
        key_NE = functional.linear(mixed_ND, heads.k_proj.weight[: heads.head_dim]).float()
        query_GE = _rotate(query_GE, cos_NE[guided.rows], sin_NE[guided.rows]) * heads.head_dim**-0.5
        key_NE = _rotate(key_NE, cos_NE, sin_NE)
        total, start = query_GE.new_zeros(()), 0
        parts = (x.split(guided.counts) for x in (query_GE, guided.rows, guided.looked_at))
        for length, query, rows, looked_at in zip(batch.lengths, *parts, strict=True):
            scores = query @ key_NE[start : start + length].T
            future = torch.arange(start, start + length, device=rows.device) > rows[:, None]
            scores = scores.masked_fill(future, -1e9)
            total = total + functional.cross_entropy(scores, looked_at - start, reduction="sum")
            start += length
        return total / len(guided.rows)

    def native(self, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
        """A plain native model with these weights (of this module's `state_dict`), the tables folded."""
        ours = dict(self.state_dict() if weights is None else weights)
        model: Any = HiggsAudioV2ForConditionalGeneration(self.model.config, use_text_head=True)
        folded: dict[str, torch.Tensor] = {}
        for name, value in ours.items():
            if not name.startswith("model.") or ".parametrizations." in name:
                continue
            folded[name.removeprefix("model.")] = value
        for path, table in (
            ("model.embed_audio_tokens.embed_audio_tokens", self.embedding),
            ("audio_lm_head", self.model.audio_lm_head),
        ):
            prefix = f"model.{path}.parametrizations.weight"
            projections = [ours[f"{prefix}.0.projections.{k}"] for k in range(len(CODEBOOK_WEIGHTS))]
            known = table.parametrizations.weight[0].known(projections)
            folded[f"{path}.weight"] = ours[f"{prefix}.original"] + known
        model.load_state_dict(folded, strict=False)
        missing = set(dict(model.named_parameters())) - set(folded)
        assert not missing, missing
        return model.eval()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def attend_in_float32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Attention in plain products, which a CPU has fast in float32 alone."""
    with torch.autocast("cpu", enabled=False):
        return attend(q.float(), k.float(), v.float(), segments).to(v.dtype)


def total_loss(losses: Mapping[str, torch.Tensor], guidance: float) -> torch.Tensor:
    """The sum that is minimised; `guidance` fades what serves training alone."""
    audio = sum(weight * losses[f"codebook {k}"] for k, weight in enumerate(CODEBOOK_WEIGHTS))
    helping = GUIDE_WEIGHT * losses["guide"] + SPOKEN_WEIGHT * (losses["spoken"] + losses["spoken next"])
    return audio + TEXT_WEIGHT * losses["text"] + guidance * helping
