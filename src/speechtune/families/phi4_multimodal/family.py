"""Phi-4-multimodal, pronunciation assessment: speech in; scores (APA) or words and phones as said (MDD) out, as JSON.

Shapes: B samples, S sequence positions, T log-mel frames, M mel bins, N audio positions of all clips, D width, P
positions that carry a target, V vocabulary.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import (
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PreTrainedTokenizerBase,
)

from speechtune.config import RunConfig
from speechtune.errors import ConfigError, ManifestError, some
from speechtune.families.layers.decoder import make_fast
from speechtune.families.layers.kernels import choose_kernels
from speechtune.families.layers.ops import head_loss
from speechtune.families.phi4_multimodal.audio import FRAMES_PER_SECOND, log_mel, num_positions
from speechtune.families.phi4_multimodal.forward import FAST_LAYERS, embed, lay_out, native_states, target_states
from speechtune.families.phi4_multimodal.options import Config
from speechtune.families.phi4_multimodal.prompts import AFTER_ANSWER, CONTROL_TOKENS, PROMPT_VERSION, PROMPTS, SPECIAL
from speechtune.families.phi4_multimodal.scores import SCORE_NAMES, score_answers, warnings_of
from speechtune.families.phi4_multimodal.speech_lora import SpeechLora, read_marker, write_marker
from speechtune.family import Family, Scorers
from speechtune.lora.apply import plain_model
from speechtune.precision import PrecisionPlan
from speechtune.storage.model_folder import load_pretrained, load_tokenizer, require_fit, require_sound
from speechtune.tasks.pronunciation.targets import TASKS, Task, render_answer, target_of, task_of, task_samples
from speechtune.types import Audio, AudioRef, Batch, Encoded, GenerationOptions, Losses, Output, Sample, Scored

log = logging.getLogger("speechtune")

RELEASED_MODEL = "microsoft/Phi-4-multimodal-instruct"
NATIVE_REVISION = "refs/pr/70"
"""Where its native weights stand; the main branch holds the remote-code version and the speech LoRA."""
REMOTE_CODE = (
    ": that is the hub's remote-code version, which is never run here; use the native weights (model.revision="
    f"{NATIVE_REVISION} of {RELEASED_MODEL}), or convert with transformers' convert_phi4_multimodal_weights_to_hf.py"
)
LANGUAGE_MODEL = r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"
AUDIO_ENCODER = (
    r"model\.embed_tokens_extend\.audio_embed\.(encoder\.encoders\.\d+\.(self_attn\.(q|k|v|o)_proj|"
    r"feed_forward_(in|out)\.(gate_up|down)_proj)|(up|down)_proj_for_speech)"
)
OTHER_LINEAR = (  # the vision encoder too, which no gradient of speech reaches: the guards refuse to train it
    r"model\.embed_tokens_extend\..*\.([qkvo]_proj|out_proj|gate_up_proj|down_proj|fc[12]|embed\.out|"
    r"(up|down)_proj_for(_vision)?_speech|img_projection_(up|down))"
)
MAX_NEW_TOKENS = 768  # the longest answers are transcripts: 20 s of speech take about 500
PROBE_FRAMES = 96


class Phi4MultimodalFamily(Family):
    """The seam's implementation for Phi-4-multimodal, on transformers' native classes."""

    name = "phi4_multimodal"
    heads: tuple[str, ...] = TASKS
    sampling_rate = 16_000
    abilities = frozenset({"assess pronunciation"})
    pipeline_tag = "automatic-speech-recognition"
    score_names = SCORE_NAMES
    fast_layers = FAST_LAYERS
    base_license = "mit"
    card_use = "For practice and research; its scores must not be used to judge people or groups of people."
    card_note = "The base's speech LoRA must be in place as base_recipe.json says; `speechtune score` sees to that."
    lora_presets: Mapping[str, str] = {
        "default": LANGUAGE_MODEL,
        "language": LANGUAGE_MODEL,
        "language+audio": f"{LANGUAGE_MODEL}|{AUDIO_ENCODER}",
        "all-linear": f"{LANGUAGE_MODEL}|{OTHER_LINEAR}",
    }
    components: Mapping[str, str] = {
        "audio_embed": "audio encoder",
        "image_embed": "vision encoder",
        "self_attn": "attention",
        ".mlp.": "FFN",
        "embed_tokens": "embeddings",
        "lm_head": "embeddings",
    }

    def __init__(self, config: RunConfig) -> None:
        if not isinstance(config, Config):
            raise TypeError(f"{type(config).__name__} is no configuration of {self.name}; see families.build_config")
        self.config = config
        self._prompts: dict[Task, list[list[int]]] = {}

    @cached_property
    def model_config(self) -> Phi4MultimodalConfig:
        """Configuration of the base model; the released one's dimensions are known without asking the hub."""
        model = self.config.model
        if model.path == RELEASED_MODEL and self.revision == NATIVE_REVISION:
            return Phi4MultimodalConfig(  # 4,743,988,032 parameters, the head tied to the embeddings
                num_attention_heads=24,
                num_key_value_heads=8,
                tie_word_embeddings=True,
                audio_config={"bias_max_distance": 500},
                dtype="bfloat16",
            )
        require_sound(model.path, "model.path")
        try:
            values, _ = Phi4MultimodalConfig.get_config_dict(model.path, revision=self.revision)
            # Not by AutoConfig: it asks at the terminal whether to run the folder's code, and a `y` would run it.
            if (model_type := values.get("model_type")) == self.name:
                return Phi4MultimodalConfig.from_dict(values)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"model.path={model.path}: no model configuration there: {error}") from None
        if model_type is None:
            raise ConfigError(f"model.path={model.path}: no model configuration there: config.json names no model_type")
        hint = REMOTE_CODE if model_type == "phi4mm" else f", not {self.name}"
        raise ConfigError(f"model.path={model.path}: model_type is {model_type!r}{hint}")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The text tokenizer, with the trained control tokens; its special names must be single known ids."""
        model = self.config.model
        _ = self.model_config  # refuses other architectures, and code, with a better message
        tokenizer = load_tokenizer(model, self.revision)
        if tokens := self.config.lora.trainable_tokens:
            unknown = sorted(set(tokens) - set(CONTROL_TOKENS.values()))
            if unknown:
                raise ConfigError(f"lora.trainable_tokens: {unknown[0]!r} is none of {list(CONTROL_TOKENS.values())}")
            tokenizer.add_tokens(list(tokens), special_tokens=True)
        for token in ("<|user|>", "<|assistant|>", "<|end|>", *tokens):
            ids = tokenizer(token, add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or tokenizer.decode(ids) != token or ids[0] >= self.model_config.vocab_size:
                raise ConfigError(
                    f"model.path={model.path}: the tokenizer reads {token} as the ids {ids} of "
                    f"{self.model_config.vocab_size}, not as one known token: it does not belong to the model"
                )
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        if end not in self.eos_ids:
            raise ConfigError(f"model.path={model.path}: <|end|> has the id {end}, the model stops at {self.eos_ids}")
        return tokenizer

    @cached_property
    def extractor(self) -> Phi4MultimodalFeatureExtractor:
        """The feature extractor of the base, or the released settings where the folder has none."""
        folder = Path(self.config.model.path)
        if (folder / "preprocessor_config.json").is_file():
            return Phi4MultimodalFeatureExtractor.from_pretrained(folder)
        return Phi4MultimodalFeatureExtractor()

    @cached_property
    def speech(self) -> SpeechLora:
        """The base's speech LoRA, without which it cannot process audio, and what becomes of it."""
        return SpeechLora(self.config.model)

    @property
    def revision(self) -> str | None:
        """Revision on the hub; of the released model the one with native weights, unless another is named."""
        native = NATIVE_REVISION if self.config.model.path == RELEASED_MODEL else None
        return self.config.model.revision or native

    @property
    def eos_ids(self) -> list[int]:
        """Token ids that end an answer."""
        ids = self.model_config.eos_token_id
        return list(ids) if isinstance(ids, list | tuple) else [cast(int, ids)]

    @property
    def audio_id(self) -> int:
        """Token id of an audio position."""
        return cast(Any, self.model_config.audio_config).audio_token_id

    @property
    def max_positions(self) -> int | None:
        return self.model_config.max_position_embeddings

    @property
    def encode_key(self) -> str:
        """Identity of the features: the extractor's settings."""
        e = self.extractor
        settings = (e.feature_size, e.sampling_rate, e.hop_length, e.n_fft, e.win_length, e.preemphasis)
        return f"phi4_multimodal log-mel v1 {settings} filters {float(np.abs(e.mel_filters).sum()):.6f}"

    def check_base(self) -> None:
        settings = self.config.model
        require_sound(settings.path, "model.path")
        if settings.attention == "flash_attention_2":
            raise ConfigError("model.attention=flash_attention_2: the speech encoder needs a bias; use sdpa or eager")
        # other architectures are refused with a better message than loading would give
        _ = self.model_config, self.tokenizer
        if self.speech.mode != "continue":  # an adapter that is the speech LoRA, trained further, brings it along
            _ = self.speech.path

    def load(self, plan: PrecisionPlan) -> nn.Module:
        """Load the base with its speech LoRA merged, stacked, or left out as configured."""
        self.check_base()
        settings = self.config.model
        model, info = load_pretrained(Phi4MultimodalForCausalLM, settings, self.revision, plan.base_dtype)
        require_fit(settings.path, info["missing_keys"], info["mismatched_keys"])
        if unused := sorted(info["unexpected_keys"]):
            log.warning("%s: %d tensors the model has no place for: %s", settings.path, len(unused), some(unused))
        model = self.speech.prepare(model.to(plan.device))
        speed = self.config.speed
        return make_fast(model, self.fast_layers, choose_kernels(speed, plan.device)) if speed.fast_forward else model

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return Phi4MultimodalForCausalLM(self.model_config)

    @property
    def initial_adapter(self) -> Path | None:
        return self.speech.path if self.speech.mode == "continue" else None

    def token_indices(self, tokens: Sequence[str]) -> dict[str, list[int]]:
        ids = [cast(int, self.tokenizer.convert_tokens_to_ids(token)) for token in tokens]
        return {"embed_tokens": ids} if ids else {}

    def unclear_base(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """See `SpeechLora.unclear`."""
        return self.speech.unclear(tensors)

    def recipe(self) -> dict[str, Any]:
        return {"speech_lora": self.speech.describe(), "prompt_version": PROMPT_VERSION}

    def expand(self, samples: Sequence[Sample]) -> list[Sample]:
        """One sample per task of each labelled utterance, in the mix of `data.tasks`.

        Raises ManifestError: samples with neither labels of pronunciation nor a task, or none of the tasks asked for.
        """
        data = self.config.data
        if unlabelled := [sample for sample in samples if sample.pronunciation is None]:
            raise ManifestError(
                f"{unlabelled[0].source}: {len(unlabelled)} of {len(samples)} samples carry no pronunciation labels: "
                "phi4_multimodal trains on Speechocean762, or on rows with 'task' and 'target' (docs/data.md); "
                "voice-cloning data is for higgs_audio_v2"
            )
        result = task_samples(samples, data.tasks, self.config.train.seed, data.star_policy)
        if samples and not result:
            raise ManifestError(f"data.tasks={data.tasks} leaves no sample of data.train")
        for sample in result:
            task_of(sample)
        return result

    def prompt(self, sample: Sample) -> Sample:
        """The utterance is the question: nothing is taken away."""
        return sample

    def clips(self, sample: Sample) -> tuple[AudioRef, ...]:
        if sample.audio is None:
            raise ManifestError(f"{sample.source or sample.id}: no audio to assess")
        return (sample.audio,)

    def encode_audio(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        """Log-mel features, float32 of shape (T, M) per clip, each computed alone."""
        return [log_mel(self.extractor, audio) for audio in audios]

    def prompt_ids(self, task: Task, num_frames: int) -> np.ndarray:
        """Token ids (S,) of a task's prompt, its audio placeholders expanded for T frames."""
        if task not in self._prompts:
            self._prompts[task] = [self._tokenize(text) for text in PROMPTS[task]]
        before, after = self._prompts[task]
        places = num_positions(num_frames, cast(Any, self.model_config.audio_config).time_reduction)
        return np.asarray([*before, *[self.audio_id] * places, *after], np.int32)

    def encode(self, sample: Sample, features: Sequence[np.ndarray]) -> Encoded:
        """Prompt, answer, and the positions whose hidden states predict the answer."""
        task = task_of(sample)
        (features_TM,) = features
        prompt_S = self.prompt_ids(task, len(features_TM))
        text = render_answer(target_of(sample))
        if special := SPECIAL.search(text):
            raise ManifestError(f"{sample.source or sample.id}: the answer holds the special token {special.group()!r}")
        answer = self._tokenize(text + AFTER_ANSWER)
        ids_S = np.concatenate([prompt_S, np.asarray(answer, np.int32)])
        arrays = {
            "input_ids": ids_S,
            "features": features_TM,
            f"{task}_positions": np.arange(len(prompt_S) - 1, len(ids_S) - 1),
            f"{task}_targets": np.asarray(answer, np.int64),
        }
        return Encoded(sample.id, arrays, len(ids_S), len(features_TM) / FRAMES_PER_SECOND)

    def collate(self, items: Sequence[Encoded]) -> Batch:
        """Lay samples end to end, or right-pad them; positions of targets become indices into the flattened batch."""
        if not items:
            raise ValueError("an empty batch")
        pairs = [(item.arrays["input_ids"], item.arrays["features"]) for item in items]
        layout = "packed" if self.config.batch.packing else "right"
        inputs, starts, lengths = lay_out(pairs, layout, self.model_config)
        counts, kept = {}, []
        for head in self.heads:
            rows = [(s, item.arrays) for s, item in zip(starts, items, strict=True) if f"{head}_targets" in item.arrays]
            if rows:
                kept += [start + arrays[f"{head}_positions"] for start, arrays in rows]
                targets = np.concatenate([arrays[f"{head}_targets"] for _, arrays in rows])
                inputs[f"{head}_targets"], counts[head] = torch.from_numpy(targets), len(targets)
        inputs["kept"] = torch.from_numpy(np.concatenate(kept))
        ids = tuple(item.sample_id for item in items)
        tokens = sum(item.num_tokens for item in items)
        return Batch(ids, inputs, counts, tokens, sum(item.audio_seconds for item in items), lengths)

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Summed cross-entropy per task, with the head (200,064 rows) applied only where a target is."""
        base = cast(Any, plain_model(model))
        parts = self._target_states(base, batch).items()
        return Losses({head: head_loss(base.lm_head, part, batch.inputs[f"{head}_targets"]) for head, part in parts})

    def _target_states(self, base: Any, batch: Batch) -> dict[str, torch.Tensor]:
        parts = target_states(base, batch).split(list(batch.target_counts.values()))
        return dict(zip(batch.target_counts, parts, strict=True))

    @torch.no_grad()
    def generate(
        self, model: nn.Module, prompts: Sequence[tuple[Sample, Sequence[np.ndarray]]], options: GenerationOptions
    ) -> list[Output]:
        """Answer a batch of prompts; greedy unless a temperature is given."""
        base = cast(Any, plain_model(model))
        pairs = [(self.prompt_ids(task_of(sample), len(f[0])), f[0]) for sample, f in prompts]
        inputs, _, _ = lay_out(pairs, "left", self.model_config)
        outputs = []
        for (sample, _), ids in zip(prompts, self._generate(base, inputs, options).tolist(), strict=True):
            end = next((place for place, token in enumerate(ids) if token in self.eos_ids), None)
            text = cast(str, self.tokenizer.decode(ids[:end], skip_special_tokens=True))
            outputs.append(Output(sample.id, None, text, end is not None, len(ids) if end is None else end + 1))
        return outputs

    @torch.no_grad()
    def count_correct(self, model: nn.Module, batch: Batch) -> dict[str, tuple[int, int]]:
        base = cast(Any, plain_model(model))
        correct = {}
        for head, states_PD in self._target_states(base, batch).items():
            right_P = base.lm_head(states_PD).argmax(-1) == batch.inputs[f"{head}_targets"]
            correct[f"token_accuracy_{head}"] = (int(right_P.sum()), batch.target_counts[head])
        return correct

    def score(
        self, samples: Sequence[Sample], outputs: Sequence[Output], scorers: Scorers, training: Sequence[Sample]
    ) -> Scored:
        return score_answers(samples, outputs, training)

    def score_warnings(self, scores: Mapping[str, float], base: Mapping[str, float]) -> list[str]:
        return warnings_of(scores)

    @torch.no_grad()
    def probe(self, model: nn.Module, greedy_steps: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        """Logits (1, S, V) on made-up features with the APA prompt, and greedily generated ids (1, R)."""
        base = cast(Any, plain_model(model))
        bins = self.extractor.feature_size
        features_TM = 6.0 + 4.0 * np.sin(np.arange(PROBE_FRAMES * bins) * 0.37).reshape(PROBE_FRAMES, bins)
        pair = (self.prompt_ids("APA", PROBE_FRAMES), features_TM.astype(np.float32))
        inputs = {name: value.to(base.device) for name, value in lay_out([pair], "right", self.model_config)[0].items()}
        logits_1SV = base.lm_head(native_states(base, inputs)).float().cpu()
        if not greedy_steps:
            return logits_1SV, np.zeros((1, 0), np.int64)
        greedy = GenerationOptions(max_new_tokens=greedy_steps)
        return logits_1SV, self._generate(base, inputs, greedy).numpy()

    def save_assets(self, directory: Path) -> None:
        """Write tokenizer and feature extractor, and a marker that the speech LoRA is in the weights."""
        self.tokenizer.save_pretrained(directory)
        self.extractor.save_pretrained(directory)
        write_marker(directory, self.speech.describe() | read_marker(Path(self.config.model.path)))

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _generate(self, base: Any, inputs: Mapping[str, torch.Tensor], options: GenerationOptions) -> torch.Tensor:
        inputs = {name: value.to(base.device) for name, value in inputs.items()}
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature:
            given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
            sampling = {"do_sample": True} | {name: value for name, value in given.items() if value is not None}
        torch.manual_seed(options.seed)
        ids_BS = base.generate(
            inputs_embeds=embed(base, inputs),
            attention_mask=inputs["attention_mask"],
            max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS,
            eos_token_id=self.eos_ids,
            pad_token_id=self.model_config.pad_token_id,
            **sampling,
        )
        return ids_BS.cpu()


FAMILY = Phi4MultimodalFamily
