"""The embedded default: a small Higgs Audio v2 model of the real classes, with tokenizer and codec, made offline.

The language model and the codec carry random weights made from a seed; the codec's codebooks are drawn from the
residuals of real speech, so that its codes follow the audio. It teaches and tests the entire pipeline; it is no voice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.higgs_audio_v2_tokenizer.configuration_higgs_audio_v2_tokenizer import (
    HiggsAudioV2TokenizerConfig,
)

from speechtune.audio import read_audio
from speechtune.families.higgs_audio_v2.codec import codec_class
from speechtune.types import Audio, AudioRef

TURN_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
STREAM_TOKENS = ("<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>", "<|reserved_special_token_6|>")
SCENE_TOKENS = ("<|scene_desc_start|>", "<|scene_desc_end|>")
SPEAKING_BASE = Path(__file__).parents[2] / "assets" / "speaking-base"
SPECIAL_TOKENS = (*TURN_TOKENS, *STREAM_TOKENS, "<|AUDIO|>", "<|AUDIO_OUT|>", *SCENE_TOKENS)


def speaking_base() -> dict[str, str]:
    """The recipe's `model` section for the small model that speaks, which ships with the project."""
    return {"path": str(SPEAKING_BASE / "model"), "codec_path": str(SPEAKING_BASE / "codec")}


def make_base(directory: Path, speech: Sequence[AudioRef]) -> dict[str, str]:
    """Make the demonstration's small model and codec, once; return the recipe's `model` section.

    The codec's codebooks are drawn from `speech`, some seconds of it.
    """
    model, codec = directory / "model", directory / "codec"
    if not (codec / "config.json").is_file():
        make_model(model, hidden_size=96, codebook_size=258, output_scale=10.0)
        make_codec(codec, [read_audio(ref, 24_000) for ref in speech], codebook_size=256)
    return {"path": str(model), "codec_path": str(codec)}


def load_plain(directory: Path) -> HiggsAudioV2ForConditionalGeneration:
    """A merged model as plain transformers loads it."""
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(directory, use_text_head=True)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token a byte, no merges) with the special names of Higgs Audio v2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )


def make_model(
    directory: Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    codebook_size: int = 1026,
    output_scale: float = 1.0,
    seed: int = 0,
) -> None:
    """Write a model folder (weights with text head, config, generation config, tokenizer) to `directory`.

    `codebook_size` includes the two stream ids. `output_scale` is the weight of the last norm: behind random heads 1
    keeps all logits near zero, and an adapter, which cannot train the heads, could never become sure of anything; 10
    lets it learn.
    """
    tokenizer = make_tokenizer()
    ids = {name: cast(int, tokenizer.convert_tokens_to_ids(name)) for name in SPECIAL_TOKENS}
    config = HiggsAudioV2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        codebook_size=codebook_size,
        audio_stream_bos_id=codebook_size - 2,
        audio_stream_eos_id=codebook_size - 1,
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ids["<|eot_id|>"],
        pad_token_id=ids["<|end_of_text|>"],
        audio_token_id=ids["<|AUDIO_OUT|>"],
        audio_bos_token_id=ids["<|audio_out_bos|>"],
        audio_delay_token_id=ids["<|reserved_special_token_6|>"],
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    model.model.norm.weight.data.fill_(output_scale)
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=50, top_p=0.95)
    model.generation_config._from_model_config = False  # else RAS is dropped when the folder is loaded
    model.generation_config.update(allow_custom_entries=True, ras_win_len=7, ras_win_max_num_repeat=2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_whisper(directory: Path, *, width: int = 32, window_seconds: int = 2, seed: int = 0) -> None:
    """Write a Whisper folder with random weights, which hears `window_seconds` at once where the released hear 30."""
    config = WhisperConfig(
        d_model=width,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_source_positions=50 * window_seconds,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperModel(config)
    model.save_pretrained(directory)
    WhisperFeatureExtractor(chunk_length=window_seconds).save_pretrained(directory)


def codec_from_config(*, codebook_size: int = 1024, width: int = 1) -> Any:
    """A codec of the real class at 24 kHz, 25 frames/s and 8 codebooks, with random weights and little width.

    Its codebooks are zeros still, so every code would be 0: `draw_codebooks` fills them.
    """
    bits = (codebook_size - 1).bit_length()
    acoustic: dict[str, Any] = {"downsampling_ratios": [8, 5, 4, 2, 3], "upsampling_ratios": [8, 5, 4, 2, 3]}
    acoustic |= {"encoder_hidden_size": 4 * width, "decoder_hidden_size": 64 * width, "hidden_size": 32 * width}
    semantic: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "conv_dim": [16] * 7}
    semantic |= {"num_hidden_layers": 1, "num_attention_heads": 2, "mask_time_prob": 0.0}
    semantic |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = HiggsAudioV2TokenizerConfig(
        target_bandwidths=[25 * bits * quantizers / 1000 for quantizers in (2, 4, 6, 8)],
        codebook_size=codebook_size,
        codebook_dim=16,
        acoustic_model_config=acoustic | {"model_type": "dac"},
        semantic_model_config=semantic | {"model_type": "hubert"},
    )
    return codec_class()(config).eval()


def make_codec(directory: Path, speech: Sequence[Audio], *, codebook_size: int = 1024, seed: int = 0) -> None:
    """Write an untrained codec folder whose codes follow the audio: drawn from `speech`, some seconds at 24 kHz."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = codec_from_config(codebook_size=codebook_size)
        draw_codebooks(codec, speech)
    codec.save_pretrained(directory)


@torch.no_grad()
def draw_codebooks(codec: Any, speech: Sequence[Audio]) -> None:
    """Fill each codebook with samples of the residuals it has to quantise."""
    seen: list[torch.Tensor] = []
    quantizer = codec.quantizer
    original = quantizer.encode

    def keep(embeddings: torch.Tensor, bandwidth: float | None = None) -> torch.Tensor:
        seen.append(embeddings)
        return original(embeddings, bandwidth)

    quantizer.encode = keep
    for audio in speech:
        codec.encode(torch.from_numpy(audio.samples)[None, None])
    del quantizer.encode
    residual_1DT = torch.cat(seen, dim=2)
    for layer in quantizer.quantizers:
        projected = layer.project_in(residual_1DT.transpose(1, 2))[0]
        size = layer.codebook.embed.shape[0]
        chosen = (
            torch.randint(len(projected), (size,)) if len(projected) < size else torch.randperm(len(projected))[:size]
        )
        jitter = projected.std(0) * 0.05 * torch.randn(size, projected.shape[1])
        layer.codebook.embed.copy_(projected[chosen] + jitter)
        residual_1DT = residual_1DT - layer.decode(layer.encode(residual_1DT))
