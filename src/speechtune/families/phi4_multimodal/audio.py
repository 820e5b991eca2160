"""Speech input of Phi-4-multimodal: log-mel features, and its speech encoder over a padded batch.

The native encoder adds its boolean padding mask to the attention scores (+1 or 0) and lets padding leak through the
convolutions before them, so that a clip's encoding depends on what it is batched with. Here the same modules are called
with padding masked at every stage: each clip is encoded as if it were alone.

Shapes: B clips, T log-mel frames (100 a second), M mel bins, C channels, E audio positions (12.5 a second), H the
encoder's width, D the language model's width, A attention heads.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Phi4MultimodalFeatureExtractor

from speechtune.errors import AudioError
from speechtune.tasks.pronunciation.targets import MAX_CLIP_SECONDS
from speechtune.types import Audio

FRAMES_PER_SECOND = 100


def log_mel(extractor: Phi4MultimodalFeatureExtractor, audio: Audio) -> np.ndarray:
    """Log-mel features, float32 of shape (T, M), of one clip alone.

    Raises AudioError: another sampling rate, shorter than one window, or longer than `MAX_CLIP_SECONDS`.
    """
    if audio.sampling_rate != extractor.sampling_rate:
        raise AudioError(f"the feature extractor wants {extractor.sampling_rate} Hz, got {audio.sampling_rate} Hz")
    if len(audio.samples) < extractor.win_length:
        raise AudioError(f"{len(audio.samples)} samples: shorter than one window of {extractor.win_length}")
    if audio.duration_seconds > MAX_CLIP_SECONDS:
        raise AudioError(f"{audio.duration_seconds:.1f} s is longer than {MAX_CLIP_SECONDS:g} s; cut it")
    features = extractor([audio.samples], sampling_rate=audio.sampling_rate, return_tensors="pt")
    return features["audio_input_features"][0].numpy()


def num_positions(num_frames: int, time_reduction: int) -> int:
    """Audio positions (placeholders in the prompt) that T frames take."""
    return -(-num_frames // time_reduction)


def pad_features(
    features: Sequence[np.ndarray], time_reduction: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clips as one batch for `embed_clips`.

    Returns:
        features (B, T, M) with zeros behind each clip, their lengths in frames (B,), and the places (N,) of the real
        audio positions among all (B * E), known before the encoder runs, so that nothing waits for a device.
    """
    clips = [torch.tensor(item) for item in features]  # copies: torch warns of arrays that the cache maps read-only
    padded_BTM = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    width = num_positions(padded_BTM.shape[1], time_reduction)
    places = [b * width + np.arange(num_positions(len(item), time_reduction)) for b, item in enumerate(features)]
    lengths = torch.tensor([len(item) for item in features])
    return padded_BTM, lengths, torch.from_numpy(np.concatenate(places))


def embed_clips(
    audio_embed: nn.Module, features_BTM: torch.Tensor, lengths_B: torch.Tensor, places_N: torch.Tensor
) -> torch.Tensor:
    """Embeddings (sum of E, D) of what `pad_features` returns, one clip after the other, whatever the padding holds.

    `audio_embed` is the native `Phi4MultimodalAudioEmbedding`.
    """
    embed: Any = audio_embed
    encoder, projection = embed.encoder, embed.up_proj_for_speech
    hidden_BTM = encoder.encoder_embedding(features_BTM.to(projection.weight.dtype))
    hidden_BEH, lengths_B = _subsample(encoder.embed, hidden_BTM, lengths_B)
    padding_BE = torch.arange(hidden_BEH.shape[1], device=hidden_BEH.device) >= lengths_B[:, None]
    scores_1AEE = encoder.relative_attention_bias_layer(hidden_BEH)
    lowest = torch.finfo(scores_1AEE.dtype).min
    mask_BAEE = scores_1AEE.masked_fill(padding_BE[:, None, None, :], lowest)
    for layer in encoder.encoders:
        hidden_BEH = layer(hidden_BEH, mask_BAEE.to(hidden_BEH.dtype))
    # Only real positions are projected; the convolutions inside the layers look back alone, never into the padding.
    hidden_NH = hidden_BEH.flatten(0, 1).index_select(0, places_N)
    return embed.down_proj_for_speech(nn.functional.gelu(projection(hidden_NH)))


def _subsample(
    subsampling: Any, hidden_BTM: torch.Tensor, lengths_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The native strided convolutions, with zeros behind each clip before every one, as at the end of a clip alone."""
    hidden_BCTM = hidden_BTM[:, None]
    for module in subsampling.conv:
        if isinstance(module, nn.Conv2d) and module.stride[0] == 2:
            frames = torch.arange(hidden_BCTM.shape[2], device=hidden_BCTM.device)
            beyond_BT = frames >= lengths_B[:, None]
            hidden_BCTM = hidden_BCTM.masked_fill(beyond_BT[:, None, :, None], 0.0)
            lengths_B = (lengths_B + 1) // 2  # kernel 3, stride 2, padding 1
        hidden_BCTM = module(hidden_BCTM)
    return subsampling.out(hidden_BCTM.transpose(1, 2).flatten(2)), lengths_B
