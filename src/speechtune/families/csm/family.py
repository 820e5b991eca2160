"""Sesame CSM: text in, speech out, in the voice of earlier turns; a backbone for codebook 0, a depth decoder for more.

Shapes: B samples, S sequence positions, F frames, A audio rows, P target rows, R rows of the depth decoder, K
codebooks, V codebook size.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import nn
from transformers import CsmConfig, CsmForConditionalGeneration, PreTrainedTokenizerBase

from speechtune.config import RunConfig
from speechtune.errors import AudioError, ConfigError, Issue, ManifestError
from speechtune.families.csm import layout
from speechtune.families.csm.adapters import CODEC, adapter_issues
from speechtune.families.csm.codec import Codec, load_mimi
from speechtune.families.csm.configuration import codes_of, read_config, released_config
from speechtune.families.csm.forward import (
    FAST_LAYERS,
    depth_logits,
    depth_loss,
    depth_states,
    draw_rows,
    embed,
    target_states,
)
from speechtune.families.csm.generation import generate_rows
from speechtune.families.csm.options import Config
from speechtune.families.csm.scores import SCORE_NAMES, count_correct_codes
from speechtune.families.layers.decoder import make_fast
from speechtune.families.layers.kernels import choose_kernels
from speechtune.families.layers.ops import head_loss
from speechtune.family import Family, Scorers
from speechtune.lora.apply import matching_modules, plain_model, target_pattern
from speechtune.precision import PrecisionPlan
from speechtune.storage.model_folder import copy_files, load_pretrained, load_tokenizer, require_fit, require_sound
from speechtune.tasks.voice_cloning.measures import score_speech, speech_warnings
from speechtune.types import Audio, AudioRef, Batch, Clip, Encoded, GenerationOptions, Losses, Output, Sample, Scored

log = logging.getLogger("speechtune")

RELEASED_MODEL = "sesame/csm-1b"
FRAMES_PER_SECOND = 12.5
PROBE_FRAMES = 12
ASSET_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
)
BACKBONE = r"backbone_model\.layers\.\d+\."
DEPTH = r"depth_decoder\.model\.layers\.\d+\."
ATTENTION = r"self_attn\.(q|k|v|o)_proj"
LINEAR = rf"({ATTENTION}|mlp\.(gate|up|down)_proj)"


class CsmFamily(Family):
    """The seam's implementation for CSM, on transformers' native class."""

    name = "csm"
    heads: tuple[str, ...] = ("backbone", "depth")
    sampling_rate = 24_000
    abilities = frozenset({"speak"})
    pipeline_tag = "text-to-speech"
    score_names = SCORE_NAMES
    scorer_names = frozenset({"wer", "sim", "mos"})
    fast_layers = FAST_LAYERS
    base_license = "apache-2.0"
    card_note = "Prompt it as in training: a reference turn of the same speaker number, then the text."
    card_use = "For speech in voices whose owners have agreed to it. Clone a voice only with its owner's consent."
    lora_presets: Mapping[str, str] = {
        "default": rf"({BACKBONE}|{DEPTH}){LINEAR}",
        "backbone": rf"{BACKBONE}{LINEAR}",
        "backbone+depth": rf"({BACKBONE}|{DEPTH}){LINEAR}",
        "attention": rf"({BACKBONE}|{DEPTH}){ATTENTION}",
        "all": rf"({BACKBONE}|{DEPTH}){LINEAR}",
    }
    components: Mapping[str, str] = {
        CODEC: "codec",
        "depth_decoder.model.layers": "depth decoder",
        "depth_decoder.model.norm": "depth decoder",
        "inputs_embeds_projector": "depth decoder",
        "backbone_model.layers": "backbone",
        "backbone_model.norm": "backbone",
        "embed_text_tokens": "text embeddings",
        "embed": "audio embeddings",
        "head": "heads",
    }

    def __init__(self, config: RunConfig) -> None:
        if not isinstance(config, Config):
            raise TypeError(f"{type(config).__name__} is no configuration of {self.name}; see families.build_config")
        self.config = config
        self._warned = False

    @cached_property
    def model_config(self) -> CsmConfig:
        """Configuration of the base model; the released one's is known without asking the hub."""
        model = self.config.model
        return released_config() if model.path == RELEASED_MODEL and model.revision is None else self._read_config()

    def _read_config(self) -> CsmConfig:
        model = self.config.model
        require_sound(model.path, "model.path")
        try:
            return read_config(model.path, model.revision)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"model.path={model.path}: no configuration of CSM there: {error}") from None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The text tokenizer; its special ids must be those of the model's configuration."""
        model = self.config.model
        tokenizer = load_tokenizer(model, model.revision)
        names = {layout.AUDIO: "audio_token_id", layout.AUDIO_END: "audio_eos_token_id", layout.BEGIN: "bos_token_id"}
        for token, field in names.items():
            token_id, wanted = tokenizer.convert_tokens_to_ids(token), getattr(self.model_config, field)
            if token_id != wanted:
                raise ConfigError(
                    f"model.path={model.path}: the tokenizer gives {token} the id {token_id}, the model's {field} is "
                    f"{wanted}; tokenizer and model do not belong together"
                )
        return tokenizer

    @cached_property
    def codec(self) -> Codec:
        """The audio codec, the base's own or the one named, on the GPU where there is one."""
        model = self.config.model
        option = "model.codec_path" if model.codec_path else "model.path"
        path, revision = (model.codec_path, model.codec_revision) if model.codec_path else (model.path, model.revision)
        require_sound(path, option)
        try:
            codec = Codec(load_mimi(path, revision), "cuda" if torch.cuda.is_available() else "cpu")
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise ConfigError(f"{option}={path}: no usable codec there: {error}") from None
        config = self.model_config
        if (codec.num_codebooks, codec.sampling_rate) != (config.num_codebooks, self.sampling_rate):
            raise ConfigError(
                f"{option}={path}: the codec has {codec.num_codebooks} codebooks at {codec.sampling_rate} Hz, the "
                f"model wants {config.num_codebooks} at {self.sampling_rate} Hz"
            )
        return codec

    @property
    def parts(self) -> Mapping[str, tuple[str, str | None]]:
        model = self.config.model
        return {"codec": (model.codec_path, model.codec_revision)} if model.codec_path else {}

    @property
    def max_positions(self) -> int | None:
        return self.model_config.max_position_embeddings

    @property
    def encode_key(self) -> str:
        """Identity of the codes: the codec's weights, wherever they are kept, and the rate."""
        return f"csm codes v1 {self.codec.fingerprint} {self.sampling_rate} Hz"

    @property
    def end_code(self) -> int:
        """Code of the row that ends speech, in every codebook."""
        return cast(int, self.model_config.codebook_eos_token_id)

    @property
    def audio_ids(self) -> tuple[int, int]:
        """Token ids that stand where frames, and ends of clips, go."""
        return cast(int, self.model_config.audio_token_id), cast(int, self.model_config.audio_eos_token_id)

    def check_base(self) -> None:
        require_sound(self.config.model.path, "model.path")
        _ = self.model_config, self.tokenizer
        lora = self.config.lora
        if not lora.enabled:
            return
        matched = matching_modules(self.skeleton(), target_pattern(self, lora))
        if inside := [name for name in matched if name.startswith(CODEC)]:
            raise ConfigError(
                f"lora.targets={lora.targets!r} matches {len(inside)} layers of the codec (first {inside[0]}), which "
                "no gradient reaches: take a preset, or a pattern of backbone_model and depth_decoder alone"
            )

    def load(self, plan: PrecisionPlan) -> nn.Module:
        """Load the base, its codec frozen, onto the plan's device."""
        self.check_base()
        settings = self.config.model
        # Read anew: what lies with the weights counts, and loading writes the dtype of this run into it.
        native, config = CsmForConditionalGeneration, self._read_config()
        model, info = load_pretrained(native, settings, settings.revision, plan.base_dtype, config=config)
        require_fit(settings.path, info["missing_keys"], info["mismatched_keys"])
        base = cast(Any, model)
        tied = (
            base.backbone_model.embed_tokens.embed_audio_tokens.weight is base.depth_decoder.model.embed_tokens.weight
        )
        if self.model_config.tie_codebooks_embeddings and not tied:
            raise ConfigError(f"model.path={settings.path}: the tables of audio embeddings came apart in loading")
        base.codec_model.requires_grad_(False)
        model = model.to(plan.device)
        speed = self.config.speed
        return make_fast(model, self.fast_layers, choose_kernels(speed, plan.device)) if speed.fast_forward else model

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            model = CsmForConditionalGeneration(self.model_config)
        model.codec_model.requires_grad_(False)
        return model

    def adapter_issues(self, config: LoraConfig, tensors: Mapping[str, torch.Tensor], directory: Path) -> list[Issue]:
        return adapter_issues(config, tensors)

    def prompt(self, sample: Sample) -> Sample:
        return replace(sample, audio=None)

    def clips(self, sample: Sample) -> tuple[AudioRef, ...]:
        """References first, then the target, as they stand in the prompt."""
        references = tuple(reference.audio for reference in sample.references)
        return references if sample.audio is None else (*references, sample.audio)

    def encode_audio(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        """Codec codes, int16 of shape (F, K) per clip."""
        for audio in audios:
            if audio.sampling_rate != self.sampling_rate:
                raise AudioError(f"the codec wants {self.sampling_rate} Hz, got {audio.sampling_rate} Hz")
        return self.codec.encode(audios)

    def prompt_arrays(self, sample: Sample, features: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """`input_ids` (S,) of all turns, and the `audio_rows` (A, K) of their clips, ends included.

        With a clip for every turn the last one is the target's; without it the prompt ends where speech begins.
        """
        turns = layout.render_turns(sample)
        wanted = len(turns) - (sample.audio is None)
        if len(features) != wanted:
            raise ManifestError(f"sample {sample.id}: {len(features)} clips for {wanted} places in the prompt")
        if (sample.system is not None or sample.scene is not None) and not self._warned:
            self._warned = True
            log.warning("CSM's prompts have no place for a system message or a scene: they are left out")
        audio_id, end_id = self.audio_ids
        num_codebooks = cast(int, self.model_config.num_codebooks)
        end_1K = np.full((1, num_codebooks), self.end_code, np.int16)
        ids: list[int] = []
        rows: list[np.ndarray] = [np.zeros((0, num_codebooks), np.int16)]
        for turn, codes_FK in zip(turns, [*features, *[None] * (len(turns) - wanted)], strict=True):
            ids += self.tokenizer(turn, add_special_tokens=False)["input_ids"]
            if codes_FK is not None:
                ids += [audio_id] * len(codes_FK) + [end_id]
                rows += [codes_FK, end_1K]
        return {"input_ids": np.asarray(ids, np.int32), "audio_rows": np.concatenate(rows)}

    def encode(self, sample: Sample, features: Sequence[np.ndarray]) -> Encoded:
        """Ids, rows, and how many of these, the last ones, are the target: its frames and its end."""
        if sample.audio is None:
            raise ManifestError(f"sample {sample.id}: no target audio to train on")
        arrays = self.prompt_arrays(sample, features)
        num_frames = len(features[-1])
        arrays["num_targets"] = np.asarray(num_frames + 1)
        return Encoded(sample.id, arrays, len(arrays["input_ids"]), num_frames / FRAMES_PER_SECOND)

    def _lay_out(
        self, items: Sequence[Mapping[str, np.ndarray]], place: layout.Layout
    ) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
        pad_id = cast(int, self.model_config.bos_token_id)  # any that is a row of the text embeddings
        return layout.lay_out(items, self.audio_ids, pad_id, place)

    def collate(self, items: Sequence[Encoded]) -> Batch:
        """Lay samples end to end, or right-pad them; positions of targets become indices into the flattened batch.

        The depth decoder's targets count in full, whatever share of them is drawn: what is drawn is weighted.
        """
        if not items:
            raise ValueError("an empty batch")
        inputs, lengths = self._lay_out([i.arrays for i in items], "packed" if self.config.batch.packing else "right")
        rows, codebooks = inputs["targets"].shape
        counts = {"backbone": rows, "depth": rows * (codebooks - 1)}
        ids = tuple(item.sample_id for item in items)
        tokens, seconds = sum(item.num_tokens for item in items), sum(item.audio_seconds for item in items)
        return Batch(ids, inputs, counts, tokens, seconds, lengths)

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Summed cross-entropy of codebook 0 over all target rows, and of the others over the rows drawn, weighted.

        In evaluation all rows are taken: what is measured must not depend on chance, nor use it up.
        """
        base, targets_PK = cast(Any, plain_model(model)), batch.inputs["targets"]
        states_PD = target_states(base, batch)
        rows, weights = draw_rows(batch.inputs, self.config.data.depth_share if model.training else 1.0)
        codes_RK = targets_PK[rows]
        states_RKD = depth_states(base.depth_decoder.model, states_PD[rows], codes_RK)
        head = base.depth_decoder.codebooks_head.weight
        return Losses(
            {
                "backbone": head_loss(base.lm_head, states_PD, targets_PK[:, 0]),
                "depth": depth_loss(states_RKD, head, codes_RK[:, 1:], weights),
            }
        )

    @torch.no_grad()
    def count_correct(self, model: nn.Module, batch: Batch) -> dict[str, tuple[int, int]]:
        base, targets_PK = cast(Any, plain_model(model)), batch.inputs["targets"]
        states_PD = target_states(base, batch)
        states_PKD = depth_states(base.depth_decoder.model, states_PD, targets_PK)
        others_PK = depth_logits(states_PKD, base.depth_decoder.codebooks_head.weight).argmax(-1)
        found_PK = torch.cat([base.lm_head(states_PD).argmax(-1)[:, None], others_PK], 1)
        return count_correct_codes(found_PK, targets_PK, batch.inputs["ends"])

    def generate(
        self, model: nn.Module, prompts: Sequence[tuple[Sample, Sequence[np.ndarray]]], options: GenerationOptions
    ) -> list[Output]:
        """Speak a batch of prompts, each cut where its speech ended."""
        codec = self.codec  # one that is missing is told before the work
        ended = [layout.cut_rows(rows_FK, self.end_code) for rows_FK in self.generate_rows(model, prompts, options)]
        audios = codec.decode([codes_FK for codes_FK, _ in ended])
        return [
            Output(sample.id, audio, None, stopped, len(codes_FK) + stopped, {"codes": codes_FK})
            for (sample, _), audio, (codes_FK, stopped) in zip(prompts, audios, ended, strict=True)
        ]

    def generate_rows(
        self, model: nn.Module, prompts: Sequence[tuple[Sample, Sequence[np.ndarray]]], options: GenerationOptions
    ) -> np.ndarray:
        """Generated rows (B, F, K), see `generation.generate_rows`."""
        base = cast(Any, plain_model(model))
        items = [self.prompt_arrays(replace(sample, audio=None), features) for sample, features in prompts]
        inputs = {name: value.to(base.device) for name, value in self._lay_out(items, "left")[0].items()}
        return generate_rows(base, inputs, self.model_config, options).cpu().numpy()

    def score(
        self, samples: Sequence[Sample], outputs: Sequence[Output], scorers: Scorers, training: Sequence[Sample]
    ) -> Scored:
        return score_speech(samples, outputs, scorers, self.sampling_rate)

    def score_warnings(self, scores: Mapping[str, float], base: Mapping[str, float]) -> list[str]:
        return speech_warnings(scores, base)

    @torch.no_grad()
    def probe(self, model: nn.Module, greedy_steps: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        """Logits (S + F * (K - 1), V) of backbone and depth decoder on a fixed prompt, and greedy rows (1, F, K)."""
        base, codebooks = cast(Any, plain_model(model)), cast(int, self.model_config.num_codebooks)
        codes_FK = np.arange(PROBE_FRAMES * codebooks) * 37 % codes_of(self.model_config)
        codes_FK = codes_FK.reshape(PROBE_FRAMES, codebooks).astype(np.int16)
        clip = AudioRef(data=b"probe")
        sample = Sample("probe", "A fixed sentence.", clip, (Clip(clip, "Another fixed sentence."),))
        encoded = self.encode(sample, [codes_FK, codes_FK])
        inputs = {name: value.to(base.device) for name, value in self._lay_out([encoded.arrays], "right")[0].items()}
        labels_1SK = torch.full((1, encoded.num_tokens, codebooks), -100, device=base.device)
        labels_1SK[0, inputs["kept"] + 1] = inputs["targets"]
        out = base(inputs_embeds=embed(base, inputs), labels=labels_1SK, use_cache=False)
        logits = torch.cat([out.logits[0], out.depth_decoder_logits.flatten(0, 1)]).float().cpu()
        if not greedy_steps:
            return logits, np.zeros((1, 0, codebooks), np.int64)
        options = GenerationOptions(temperature=0, max_new_tokens=greedy_steps)
        return logits, self.generate_rows(model, [(sample, [codes_FK])], options)

    def save_assets(self, directory: Path) -> None:
        """Copy tokenizer, processor and chat template files of the base as they are."""
        copy_files(self.config.model.path, self.config.model.revision, ASSET_PATTERNS, directory)


FAMILY = CsmFamily
