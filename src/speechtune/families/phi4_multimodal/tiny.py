"""A small Phi-4-multimodal of the real classes, with a tokenizer made from the prompts it will see; all offline.

Its weights are random. With a speech LoRA, half of what its language model does with audio lies in that adapter, as in
the released model: leaving it out changes every answer.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PreTrainedTokenizerFast,
)

from speechtune.families.phi4_multimodal.family import LANGUAGE_MODEL
from speechtune.families.phi4_multimodal.prompts import CONTROL_TOKENS, RUBRICS
from speechtune.families.phi4_multimodal.speech_lora import FOLDER
from speechtune.tasks.pronunciation.phones import PHONES, UNKNOWN
from speechtune.tasks.pronunciation.targets import SCORE_FIELDS
from speechtune.types import AudioRef

SPECIAL_TOKENS = ("<|endoftext|>", "<|image|>", "<|audio|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
NUMBER_OF_TOKENS = 1024
SPARE_ROWS = 32
"""Rows of the embedding that belong to no token yet, as in the released model."""


def make_base(directory: Path, speech: Sequence[AudioRef]) -> dict[str, str]:
    """Make the demonstration's small model with a speech LoRA, once, without `speech`; the recipe's `model` section."""
    if not (directory / "config.json").is_file():
        make_model(directory, hidden_size=96, output_scale=10.0, speech_lora_rank=4)
    return {"path": str(directory), "speech_lora": "merge"}


def load_plain(directory: Path) -> Phi4MultimodalForCausalLM:
    """A merged model as plain transformers loads it."""
    return Phi4MultimodalForCausalLM.from_pretrained(directory)


def make_tokenizer(texts: Iterable[str] = (), vocab_size: int = NUMBER_OF_TOKENS) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the prompts, the forms of their answers and `texts`, with Phi-4's special names."""
    scores = ", ".join(f'"{name}": {value}' for name in SCORE_FIELDS for value in range(11))
    phones = " ".join([*PHONES, UNKNOWN])
    answers = (f"{{{scores}}}", f'{{"word_transcript": "", "phoneme_transcript": "{phones}"}}')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet, min_frequency=2
    )
    tokenizer.train_from_iterator([*CONTROL_TOKENS.values(), *RUBRICS.values(), *answers, *texts] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)


def tiny_config(tokenizer: PreTrainedTokenizerFast, **options: Any) -> Phi4MultimodalConfig:
    """Configuration of a small model; `options` replace language-model options, `audio` those of the speech encoder."""
    ids = {name: cast(int, tokenizer.convert_tokens_to_ids(name)) for name in SPECIAL_TOKENS}
    audio: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_blocks": 2, "num_attention_heads": 4}
    audio |= {"nemo_conv_channels": 16, "bias_max_distance": 100, "audio_token_id": ids["<|audio|>"]}
    audio |= options.pop("audio", {})
    audio |= dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel"), audio["hidden_size"])
    # Vision as small as it can be: no picture is ever shown, and None would build 428 million parameters.
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "crop_size": 28, "image_token_id": ids["<|image|>"]}
    language: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    language |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    language |= {"vocab_size": len(tokenizer) + SPARE_ROWS, "tie_word_embeddings": True, "initializer_range": 0.05}
    language |= dict.fromkeys(("bos_token_id", "pad_token_id"), ids["<|endoftext|>"])
    language |= {"eos_token_id": [ids["<|endoftext|>"], ids["<|end|>"]]} | options
    return Phi4MultimodalConfig(**language, audio_config=audio, vision_config=vision)


def make_model(
    directory: Path,
    texts: Iterable[str] = (),
    *,
    output_scale: float = 1.0,
    speech_lora_rank: int = 0,
    seed: int = 0,
    **options: Any,
) -> None:
    """Write a model folder: weights, configuration, tokenizer learnt from the prompts and `texts`, feature extractor.

    `output_scale` is as in `speechtune.families.higgs_audio_v2.tiny.make_model`, `options` are those of `tiny_config`;
    with `speech_lora_rank` a random speech LoRA lies in the folder `speech-lora`.
    """
    tokenizer = make_tokenizer(texts)
    config = tiny_config(tokenizer, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Phi4MultimodalForCausalLM(config)
        model.model.norm.weight.data.fill_(output_scale)
        model.generation_config.update(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
        model.save_pretrained(directory)
        if rank := speech_lora_rank:
            lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LANGUAGE_MODEL, init_lora_weights=False)
            get_peft_model(cast(Any, model), lora).save_pretrained(str(directory / FOLDER))
    tokenizer.save_pretrained(directory)
    Phi4MultimodalFeatureExtractor().save_pretrained(directory)
