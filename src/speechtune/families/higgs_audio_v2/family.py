"""Higgs Audio v2, zero-shot voice cloning: text and a reference clip in, speech in that voice out.

Shapes: B samples, S sequence positions, R audio rows, K codebooks, F frames, P positions that carry a target,
V codebook size.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, PreTrainedTokenizerBase

from speechtune.config import RunConfig
from speechtune.errors import AudioError, ConfigError, Issue, ManifestError
from speechtune.families.higgs_audio_v2 import layout
from speechtune.families.higgs_audio_v2.boson import BOSON, is_legacy, legacy_config, load_legacy
from speechtune.families.higgs_audio_v2.codec import Codec, layers_of, load_codec, sampling_rate_of
from speechtune.families.higgs_audio_v2.conditioning import Conditioning, batch_rows, conditioned, folder_issue
from speechtune.families.higgs_audio_v2.forward import FAST_LAYERS, target_states
from speechtune.families.higgs_audio_v2.generation import new_rows
from speechtune.families.higgs_audio_v2.options import Config
from speechtune.families.higgs_audio_v2.scores import SCORE_NAMES, count_correct_codes
from speechtune.families.higgs_audio_v2.whisper import WhisperEncoder
from speechtune.families.layers.decoder import make_fast
from speechtune.families.layers.kernels import choose_kernels
from speechtune.families.layers.ops import IGNORE, head_loss
from speechtune.family import Family, Scorers
from speechtune.lora.apply import plain_model
from speechtune.precision import PrecisionPlan
from speechtune.storage.files import folder_fingerprint
from speechtune.storage.model_folder import (
    copy_files,
    hub_commit,
    load_pretrained,
    load_tokenizer,
    require_fit,
    require_sound,
)
from speechtune.tasks.voice_cloning.measures import score_speech, speech_warnings
from speechtune.types import Audio, AudioRef, Batch, Clip, Encoded, GenerationOptions, Losses, Output, Sample, Scored

log = logging.getLogger("speechtune")

RELEASED_MODEL = "bosonai/higgs-audio-v2-generation-3B-base"
RELEASED_CODEC = "bosonai/higgs-audio-v2-tokenizer"
FRAMES_PER_SECOND = 25
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
ASSET_PATTERNS = (*TOKENIZER_FILES, "*processor_config.json")


class HiggsAudioV2Family(Family):
    """The seam's implementation for Higgs Audio v2, on transformers' native classes."""

    name = "higgs_audio_v2"
    heads: tuple[str, ...] = ("audio", "text")
    abilities = frozenset({"speak"})
    pipeline_tag = "text-to-speech"
    score_names = SCORE_NAMES
    scorer_names = frozenset({"wer", "sim", "mos"})
    fast_layers = FAST_LAYERS
    base_license = "other"
    card_use = "For speech in voices whose owners have agreed to it. Clone a voice only with its owner's consent."
    lora_presets: Mapping[str, str] = {
        "default": r".*\.(self_attn\.(q|k|v|o)_proj|audio_mlp\.(gate|up|down)_proj)",
        "attention": r".*\.self_attn\.(q|k|v|o)_proj",
        "attention+audio_ffn": r".*\.(self_attn\.(q|k|v|o)_proj|audio_mlp\.(gate|up|down)_proj)",
        "all": r".*\.(self_attn\.(q|k|v|o)_proj|(audio_)?mlp\.(gate|up|down)_proj)",
    }
    components: Mapping[str, str] = {
        "self_attn": "attention",
        "audio_mlp": "audio FFN",
        ".mlp.": "text FFN",
        "embed": "embeddings",
        "lm_head": "heads",
        "reference_projector": "reference projector",
    }
    adapter_layouts = MappingProxyType({"boson": BOSON})

    def __init__(self, config: RunConfig) -> None:
        if not isinstance(config, Config):
            raise TypeError(f"{type(config).__name__} is no configuration of {self.name}; see families.build_config")
        self.config = config
        self.conditioning = Conditioning(config)
        self._prompts_seen: set[str | None] = set()

    @cached_property
    def model_config(self) -> HiggsAudioV2Config:
        """Configuration of the base model; the released one is known without asking the hub."""
        model = self.config.model
        path = Path(model.path)
        require_sound(model.path, "model.path")
        if is_legacy(path):
            return legacy_config(path)
        if model.path == RELEASED_MODEL and model.revision is None:
            return HiggsAudioV2Config(codebook_size=1026, dtype="bfloat16")
        try:
            loaded = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path={model.path}: no model configuration there: {error}") from None
        if not isinstance(loaded, HiggsAudioV2Config):
            raise ConfigError(f"model.path={model.path}: model_type is {loaded.model_type!r}, not higgs_audio_v2")
        return loaded

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The text tokenizer; its special ids must be those of the model's configuration."""
        model = self.config.model
        tokenizer = load_tokenizer(model, model.revision)
        for token, field in ((layout.AUDIO, "audio_token_id"), ("<|audio_out_bos|>", "audio_bos_token_id")):
            token_id, wanted = tokenizer.convert_tokens_to_ids(token), getattr(self.model_config, field)
            if token_id != wanted:
                raise ConfigError(
                    f"model.path={model.path}: the tokenizer gives {token} the id {token_id}, the model's {field} is "
                    f"{wanted}; tokenizer and model do not belong together"
                )
        return tokenizer

    @cached_property
    def codec(self) -> Codec:
        """The audio codec, on the GPU where there is one."""
        model = self.config.model
        require_sound(self.codec_path, "model.codec_path")
        try:
            codec = load_codec(self.codec_path, model.codec_revision, self._codec_device)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"model.codec_path={self.codec_path}: no usable codec there: {error}") from None
        if codec.num_codebooks != self.model_config.num_codebooks:
            raise ConfigError(
                f"model.codec_path={self.codec_path}: {codec.num_codebooks} codebooks, the model has "
                f"{self.model_config.num_codebooks}"
            )
        return codec

    @property
    def card_note(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # as it is conditioned
        note = "Give it text and a few seconds of reference speech; it answers with audio codes of the base's codec."
        return f"{note} {self.conditioning.card_note}".strip()

    @cached_property
    def sampling_rate(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # the codec's
        return sampling_rate_of(self.codec_path, self.config.model.codec_revision)

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        return cast(int, self.model_config.pad_token_id)

    @property
    def codec_path(self) -> str:
        """Hub id or folder of the codec."""
        return self.config.model.codec_path or RELEASED_CODEC

    @property
    def parts(self) -> Mapping[str, tuple[str, str | None]]:
        model = self.config.model
        parts = {"codec": (model.codec_path, model.codec_revision), "whisper": (model.whisper_path, None)}
        return {name: (path, revision) for name, (path, revision) in parts.items() if path}

    @property
    def reference_encoder(self) -> WhisperEncoder | None:
        return self.conditioning.encoder

    def recipe(self) -> dict[str, Any]:
        return self.conditioning.recipe

    def add_to_base(self, model: nn.Module, adapter: Path | None, *, training: bool = False) -> None:
        self.conditioning.add_projector(plain_model(model), adapter, training=training)

    def adapter_issues(self, config: LoraConfig, tensors: Mapping[str, torch.Tensor], directory: Path) -> list[Issue]:
        reason = folder_issue(directory)
        return [Issue(str(directory), "", "missing_projector", reason)] if reason else []

    @property
    def max_positions(self) -> int | None:
        return self.model_config.max_position_embeddings

    @property
    def encode_key(self) -> str:
        """Identity of the codes: class, weights (by content where local), rate, and whose layers compute them."""
        identity = self._codec_identity
        layers = layers_of(self.codec_path, self.config.model.codec_revision, self._codec_device)
        return f"higgs_audio_v2 codes v1 {identity} {self.sampling_rate} Hz {layers} layers"

    @property
    def _codec_device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def _codec_identity(self) -> str:
        require_sound(self.codec_path, "model.codec_path")
        path = Path(self.codec_path)
        if path.is_dir():
            return folder_fingerprint(path)
        return f"{self.codec_path}@{hub_commit(self.codec_path, self.config.model.codec_revision)}"

    def check_base(self) -> None:
        require_sound(self.config.model.path, "model.path")
        _ = self.model_config, self.tokenizer, self.conditioning.width

    def load(self, plan: PrecisionPlan) -> nn.Module:
        """Load the base with its text head (a default load would drop it) onto the plan's device."""
        self.check_base()
        settings = self.config.model
        if is_legacy(Path(settings.path)):
            model = load_legacy(Path(settings.path), plan.base_dtype, settings.attention)
        else:
            native = HiggsAudioV2ForConditionalGeneration
            model, info = load_pretrained(native, settings, settings.revision, plan.base_dtype, use_text_head=True)
            missing, unexpected = set(info["missing_keys"]), info["unexpected_keys"]
            if missing == {"text_lm_head.weight"}:
                log.warning("%s has no text head: it was saved without one; the text loss is left out", settings.path)
                cast(Any, model).text_lm_head = None
                missing.clear()
            if unexpected:  # converted folders may carry a head twice, under its old name too
                log.warning("%s: weights the model has no place for are left out: %s", settings.path, unexpected)
            require_fit(settings.path, missing, info["mismatched_keys"])
        model = model.to(plan.device)
        speed = self.config.speed
        return make_fast(model, self.fast_layers, choose_kernels(speed, plan.device)) if speed.fast_forward else model

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return HiggsAudioV2ForConditionalGeneration(self.model_config, use_text_head=True)

    def expand(self, samples: Sequence[Sample]) -> list[Sample]:
        self.conditioning.check(samples)
        return list(samples)

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

    def prompt_arrays(
        self, sample: Sample, features: Sequence[np.ndarray], *, with_target: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (S,) with placeholders expanded, and the delayed rows (R, K) of all clips, in order."""
        parts = layout.render_prompt(sample, with_target=with_target).split(layout.AUDIO)
        if len(parts) != len(features) + 1:
            raise ManifestError(f"sample {sample.id}: {len(features)} clips for {len(parts) - 1} places in the prompt")
        config = self.model_config
        if with_target and sample.system not in self._prompts_seen:
            self._prompts_seen.add(sample.system)
            if sample.system is not None:
                log.info("prompts carry the system message %r; it is kept beside the weights", sample.system)
        ids: list[int] = []
        rows: list[np.ndarray] = [np.zeros((0, config.num_codebooks), np.int64)]
        for part, codes_FK in zip(parts, [*features, None], strict=True):
            ids += self._tokenize(part)
            if codes_FK is not None:
                rows_RK = layout.delay_rows(codes_FK, config.audio_stream_bos_id, config.audio_stream_eos_id)
                fillers = config.num_codebooks - 1
                ids += [config.audio_token_id] * (len(rows_RK) - fillers) + [config.audio_delay_token_id] * fillers
                rows.append(rows_RK)
        return np.asarray(ids, np.int32), np.concatenate(rows)

    @cached_property
    def _tokenize(self) -> Callable[[str], Sequence[int]]:
        """Ids of a text. What comes up to a reference's audio is the same for all requests in a voice."""
        tokenizer = self.tokenizer
        return lru_cache(1024)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, sample: Sample, features: Sequence[np.ndarray]) -> Encoded:
        """Prompt ids, rows, and the targets with the positions whose hidden states predict them."""
        if sample.audio is None:
            raise ManifestError(f"sample {sample.id}: no target audio to train on")
        codes, heard_NW = self.conditioning.split(sample, features)
        ids_S, rows_RK = self.prompt_arrays(sample, codes, with_target=True)
        num_frames = len(codes[-1])
        num_last_tokens = len(self._tokenize("<|audio_eos|><|eot_id|>"))
        arrays = layout.target_arrays(ids_S, rows_RK, num_frames, num_last_tokens)
        arrays |= {"reference_features": heard_NW} if self.conditioning.is_on else {}
        return Encoded(sample.id, arrays, len(ids_S), num_frames / FRAMES_PER_SECOND)

    def collate(self, items: Sequence[Encoded]) -> Batch:
        """Lay samples end to end, or right-pad them; positions of targets become indices into the flattened batch."""
        if not items:
            raise ValueError("an empty batch")
        arrays = [item.arrays for item in items]
        inputs, lengths = layout.lay_out(arrays, self.model_config, packed=self.config.batch.packing)
        if self.conditioning.is_on:
            ends = np.cumsum([0, *(len(item["audio_rows"]) for item in arrays)])
            inputs |= batch_rows([item["reference_features"] for item in arrays], ends[:-1].tolist())
        # Per codebook: the audio loss is the sum over codebooks of mean cross-entropies, as in the native class.
        counts = {
            "audio": int((inputs["audio_targets"][:, 0] != IGNORE).sum()),
            "text": int((inputs["text_targets"] != IGNORE).sum()),
        }
        ids = tuple(item.sample_id for item in items)
        num_tokens = sum(item.num_tokens for item in items)
        return Batch(ids, inputs, counts, num_tokens, sum(item.audio_seconds for item in items), lengths)

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Summed cross-entropy per head, with the heads applied only where a target is."""
        base = cast(Any, plain_model(model))
        audio_PD, text_PD = self._target_states(base, batch)
        sums = {"audio": head_loss(base.audio_lm_head, audio_PD, batch.inputs["audio_targets"])}
        if base.text_lm_head is not None:
            sums["text"] = head_loss(base.text_lm_head, text_PD, batch.inputs["text_targets"])
        return Losses(sums)

    def _target_states(self, base: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with conditioned(base, batch.inputs):
            return target_states(base.model, batch)

    def generate(
        self, model: nn.Module, prompts: Sequence[tuple[Sample, Sequence[np.ndarray]]], options: GenerationOptions
    ) -> list[Output]:
        """Speak a batch of prompts; clips and text as in training, rows cut where the stream ended."""
        eos, codec = self.model_config.audio_stream_eos_id, self.codec  # one that is missing is told before the work
        ended = [layout.cut_rows(rows_RK, eos) for rows_RK in self.generate_rows(model, prompts, options)]
        codes = [layout.undelay(rows_RK, eos, codec.codebook_size) for rows_RK in ended]
        audios = codec.decode([codes_FK for codes_FK, _ in codes])
        return [
            Output(sample.id, audio, None, stopped, len(rows_RK), {"codes": codes_FK, "rows": rows_RK})
            for (sample, _), audio, rows_RK, (codes_FK, stopped) in zip(prompts, audios, ended, codes, strict=True)
        ]

    def generate_rows(
        self, model: nn.Module, prompts: Sequence[tuple[Sample, Sequence[np.ndarray]]], options: GenerationOptions
    ) -> np.ndarray:
        """Generated rows of shape (B, R, K), the prompts' own rows left out; ended samples go on with EOS."""
        inputs, heard = self._padded(prompts, with_target=False)
        return new_rows(model, inputs, heard, options)

    def _padded(
        self, prompts: Sequence[tuple[Sample, Sequence[np.ndarray]]], *, with_target: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Inputs of the native class, on the left where generation follows, and the reference rows among theirs."""
        parts = [(sample, *self.conditioning.split(sample, features)) for sample, features in prompts]
        arrays = [self.prompt_arrays(sample, codes, with_target=with_target) for sample, codes, _ in parts]
        eos = self.model_config.audio_stream_eos_id
        inputs = layout.pad_inputs(arrays, self.pad_id, eos, left=not with_target)
        num_rows = inputs["audio_input_ids"].shape[1]
        starts = [number * num_rows for number in range(len(parts))]
        return inputs, batch_rows([heard_NW for *_, heard_NW in parts], starts)

    @torch.no_grad()
    def count_correct(self, model: nn.Module, batch: Batch) -> dict[str, tuple[int, int]]:
        eos = self.model_config.audio_stream_eos_id
        base = cast(Any, plain_model(model))
        logits = base.audio_lm_head(self._target_states(base, batch)[0])
        logits_PKV = logits.unflatten(-1, (self.model_config.num_codebooks, -1))
        return count_correct_codes(logits_PKV, batch.inputs["audio_targets"], eos)

    def score(
        self, samples: Sequence[Sample], outputs: Sequence[Output], scorers: Scorers, training: Sequence[Sample]
    ) -> Scored:
        return score_speech(samples, outputs, scorers, self.sampling_rate)

    def score_warnings(self, scores: Mapping[str, float], base: Mapping[str, float]) -> list[str]:
        return speech_warnings(scores, base)

    @torch.no_grad()
    def probe(self, model: nn.Module, greedy_steps: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        """Audio logits on a fixed prompt with made-up codes, and greedy rows of shape (1, R, K)."""
        config = self.model_config
        codes_FK = (np.arange(12 * config.num_codebooks) * 37 % (config.codebook_size - 2)).astype(np.int16)
        codes_FK = codes_FK.reshape(12, config.num_codebooks)
        clip = AudioRef(data=b"probe")
        sample = Sample("probe", "A fixed sentence.", clip, (Clip(clip, "Another fixed sentence."),))
        base = cast(Any, plain_model(model))
        heard = self.conditioning.made_up(2 * len(codes_FK))
        inputs, rows = self._padded([(sample, [codes_FK, codes_FK, *heard])], with_target=True)
        inputs, rows = ({k: v.to(base.device) for k, v in part.items()} for part in (inputs, rows))
        with conditioned(base, rows):
            logits = model(**inputs).logits.float().cpu()
        if not greedy_steps:
            return logits, np.zeros((1, 0, config.num_codebooks), np.int64)
        options = GenerationOptions(temperature=0, max_new_tokens=greedy_steps)
        return logits, self.generate_rows(model, [(replace(sample, audio=None), [codes_FK, *heard])], options)

    def save_assets(self, directory: Path) -> None:
        """Copy tokenizer, processor and chat template files of the base as they are."""
        copy_files(self.config.model.path, self.config.model.revision, ASSET_PATTERNS, directory)


FAMILY = HiggsAudioV2Family
