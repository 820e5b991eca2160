"""The embedded default: a small CSM of the real classes, with tokenizer and Mimi, made offline.

Everything carries random weights made from a seed; the codec's codebooks are drawn from the residuals of real speech,
so that its codes follow the audio. It teaches and tests the entire pipeline; it is no voice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CsmConfig, CsmForConditionalGeneration, MimiConfig, MimiModel, PreTrainedTokenizerFast

from speechtune.audio import read_audio
from speechtune.families.csm.configuration import read_config, tie
from speechtune.types import Audio, AudioRef

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>")
DEMO_DATA = {"depth_share": 1.0}
"""A demonstration is too short to learn codes by heart of which a step sees one in sixteen."""
EXTRA_CODES = 3
"""Rows of each codebook's embedding that are no code of Mimi, as in the released model."""


def make_base(directory: Path, speech: Sequence[AudioRef]) -> dict[str, str]:
    """Make the demonstration's small model, its codec inside, once; return the recipe's `model` section.

    The codec's codebooks are drawn from `speech`, some seconds of it.
    """
    if not (directory / "config.json").is_file():
        clips = [read_audio(ref, 24_000) for ref in speech]
        make_model(directory, clips, hidden_size=96, codebook_size=256, output_scale=10.0)
    return {"path": str(directory)}


def load_plain(directory: Path) -> CsmForConditionalGeneration:
    """A merged model as plain transformers loads it."""
    loaded = CsmForConditionalGeneration.from_pretrained(directory, config=read_config(directory))
    return cast(CsmForConditionalGeneration, loaded)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token a byte, no merges) with CSM's special names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    names = dict(zip(("bos_token", "eos_token"), SPECIAL_TOKENS, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|end_of_text|>", clean_up_tokenization_spaces=False, **names
    )


def tiny_codec_config(num_codebooks: int, codebook_size: int) -> MimiConfig:
    """Mimi at its own rates (24 kHz, 12.5 frames a second), with little width."""
    return MimiConfig(
        hidden_size=32,
        num_filters=4,
        num_quantizers=num_codebooks,
        codebook_size=codebook_size,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        upsample_groups=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
    )


def tiny_config(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_codebooks: int, codebook_size: int
) -> CsmConfig:
    """Configuration of a small model: two layers in the backbone, two in the depth decoder."""
    ids = [cast(int, tokenizer.convert_tokens_to_ids(name)) for name in SPECIAL_TOKENS]
    shared: dict[str, Any] = {"num_codebooks": num_codebooks, "vocab_size": codebook_size + EXTRA_CODES}
    shared |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05}
    depth = {"hidden_size": hidden_size // 2, "backbone_hidden_size": hidden_size, "intermediate_size": hidden_size}
    return CsmConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        text_vocab_size=len(tokenizer),
        codebook_pad_token_id=codebook_size + EXTRA_CODES - 1,
        bos_token_id=ids[0],
        pad_token_id=ids[2],
        audio_token_id=ids[2],
        audio_eos_token_id=ids[3],
        depth_decoder_config=shared | depth | {"max_position_embeddings": num_codebooks + 1},
        codec_config=tiny_codec_config(num_codebooks, codebook_size).to_dict(),
        **shared,
    )


def make_model(
    directory: Path,
    speech: Sequence[Audio],
    *,
    hidden_size: int = 64,
    num_codebooks: int = 8,
    codebook_size: int = 64,
    output_scale: float = 1.0,
    seed: int = 0,
) -> None:
    """Write a model folder (weights with codec, config, generation config, tokenizer) to `directory`.

    The codec's codebooks are drawn from `speech` at 24 kHz; without it they are zeros. `output_scale` is the weight of
    the last norms: behind random heads 1 keeps all logits near zero, and an adapter, which cannot train them, could
    never become sure of anything; 10 lets it learn.
    """
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tie(tiny_config(tokenizer, hidden_size, num_codebooks, codebook_size))
        model = cast(Any, CsmForConditionalGeneration(config))
        if speech:
            draw_codebooks(model.codec_model.eval(), speech)
    for norm in (model.backbone_model.norm, model.depth_decoder.model.norm):
        norm.weight.data.fill_(output_scale)
    # As in the released files; a configuration that says it is made of the model's own would lose the depth decoder's.
    sampling = {"do_sample": True, "temperature": 0.9, "top_k": 50}
    for settings in (model.generation_config, model.depth_decoder.generation_config):
        settings.update(**sampling)
        settings._from_model_config = False
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def draw_codebooks(codec: MimiModel, speech: Sequence[Audio]) -> None:
    """Fill each codebook with samples of the residuals it has to quantise."""
    split = cast(Any, codec.quantizer)
    seen: list[torch.Tensor] = []
    original = split.encode

    def keep(embeddings: torch.Tensor, num_quantizers: int | None = None) -> torch.Tensor:
        seen.append(embeddings)
        return original(embeddings, num_quantizers)

    split.encode = keep
    for audio in speech:
        codec.encode(torch.from_numpy(audio.samples)[None, None])
    del split.encode
    latents_1DF = torch.cat(seen, dim=2)
    for quantizer in (split.semantic_residual_vector_quantizer, split.acoustic_residual_vector_quantizer):
        residual_1CF = quantizer.input_proj(latents_1DF)
        for layer in quantizer.layers:
            vectors_FC, book = residual_1CF[0].T, layer.codebook
            chosen = torch.randint(len(vectors_FC), (book.codebook_size,))
            jitter_VC = vectors_FC.std(0) * 0.05 * torch.randn(book.codebook_size, vectors_FC.shape[1])
            book.embed_sum.copy_(vectors_FC[chosen] + jitter_VC)
            book._embed = None  # the entries it has computed from the sums
            residual_1CF = residual_1CF - layer.decode(layer.encode(residual_1CF))
