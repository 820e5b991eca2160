"""How references are pooled for Whisper conditioning: means of even spans, or attention, by what can be read from them.

    python bench/pooling.py --whisper WHISPER --speakers SPEECHOCEAN --speech SPEECH

Two probes behind a projector like the one that is trained: who speaks, from 8 embeddings of a recording (learners of
English, real ones, from `SPEECHOCEAN`), and which phoneme is spoken in a codec frame, from one embedding a frame
(synthetic voices of `examples/speaking_base/speech.py`, whose phonemes' times are known). Attention has learned
queries: 8 over the complete clip for the first probe; for the second one over the frame and what is around it. Clips
are held out.
"""

import argparse
import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from speechtune.audio import read_audio
from speechtune.families.higgs_audio_v2.whisper import WhisperEncoder, whisper_fingerprint
from speechtune.precision import plan_precision
from speechtune.tasks.statistics import estimate
from speechtune.types import Audio, AudioRef

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "speaking_base"))
from features import SAMPLING_RATE, read_speech, spoken_phonemes

FRAME_SAMPLES = 640
SPEAKER_POSITIONS, NEIGHBOURS = 8, 3
SPEAKERS, SPEAKER_CLIPS, SPEAKER_HELD_OUT, PHONEME_CLIPS = 24, 6, 2, 60
STEPS, RATE, HIDDEN, SEEDS = 200, 1e-3, 128, 3

Clips = list[tuple[torch.Tensor, torch.Tensor]]
"""What Whisper hears of each clip (T, W), and the classes of its P embeddings (P,)."""


class Mean(nn.Module):
    """Means over even spans: (T, W) to (P, W)."""

    def __init__(self, width: int, positions: int | None) -> None:
        super().__init__()

    def forward(self, heard_TW: torch.Tensor, count: int) -> torch.Tensor:
        return functional.adaptive_avg_pool1d(heard_TW.T[None], count)[0].T


class Attention(nn.Module):
    """Learned queries: `positions` of them over the clip, or one over each span and its neighbours."""

    def __init__(self, width: int, positions: int | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(positions or 1, width) / width**0.5)
        self.nearness = nn.Parameter(torch.zeros(()))
        self.local = positions is None

    def forward(self, heard_TW: torch.Tensor, count: int) -> torch.Tensor:
        scores_PT = (self.query @ self.norm(heard_TW).T).expand(count, -1)
        if self.local:
            middles_P = (torch.arange(count) + 0.5) * len(heard_TW) / count - 0.5
            apart_PT = (torch.arange(len(heard_TW)) - middles_P[:, None]).abs()
            scores_PT = scores_PT - functional.softplus(self.nearness) * apart_PT
            scores_PT = scores_PT.masked_fill(apart_PT > NEIGHBOURS, -torch.inf)
        return scores_PT.softmax(-1) @ heard_TW


def probe(
    kind: type[nn.Module], clips: Clips, held_out: Clips, classes: int, positions: int | None, seed: int
) -> np.ndarray:
    """Train pooling and projector to tell the classes; which embeddings of the held-out clips are told right."""
    torch.manual_seed(seed)
    width = clips[0][0].shape[1]
    pooling = kind(width, positions)
    projector = nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, classes)
    )

    def answer(heard_TW: torch.Tensor, wanted_P: torch.Tensor) -> torch.Tensor:
        logits = projector(pooling(heard_TW, positions or len(wanted_P)))
        return logits if positions is None else logits.mean(0, keepdim=True)

    optimizer = torch.optim.AdamW([*pooling.parameters(), *projector.parameters()], RATE)
    draw = np.random.default_rng(seed)
    for _ in range(STEPS):
        chosen = [clips[index] for index in draw.choice(len(clips), 16, replace=False)]
        logits, wanted = torch.cat([answer(*clip) for clip in chosen]), torch.cat([wanted for _, wanted in chosen])
        optimizer.zero_grad()
        functional.cross_entropy(logits, wanted).backward()
        optimizer.step()
    with torch.no_grad():
        return np.concatenate([(answer(*clip).argmax(-1) == clip[1]).numpy() for clip in held_out]).astype(float)


def speaker_clips(encoder: WhisperEncoder, corpus: Path) -> tuple[Clips, Clips, int]:
    """Recordings of each speaker, the last ones held out."""
    files: dict[str, list[Path]] = defaultdict(list)
    for split in ("train", "test"):
        places = dict(line.split(maxsplit=1) for line in (corpus / split / "wav.scp").read_text().splitlines())
        for line in (corpus / split / "utt2spk").read_text().splitlines():
            name, speaker = line.split()
            files[speaker].append(corpus / places[name])
    clips: Clips = []
    held_out: Clips = []
    for number, speaker in enumerate(sorted(files)[:SPEAKERS]):
        for index, path in enumerate(files[speaker][:SPEAKER_CLIPS]):
            (heard_TW,) = encoder.encode_audio([read_audio(AudioRef(str(path)), encoder.sampling_rate)])
            part = held_out if index >= SPEAKER_CLIPS - SPEAKER_HELD_OUT else clips
            part.append((torch.from_numpy(heard_TW.astype(np.float32)), torch.tensor([number])))
    return clips, held_out, SPEAKERS


def phoneme_clips(encoder: WhisperEncoder, speech: Path) -> tuple[Clips, Clips, int]:
    """Synthetic clips with the phoneme of each codec frame, every fourth one held out."""
    shards = sorted(speech.glob("kokoro-*.npz"))
    every = (clip for shard in shards for clip in read_speech(shard) if clip.row["split"] == "train")
    numbers: dict[str, int] = {}
    found: Clips = []
    for clip in islice(every, PHONEME_CLIPS):
        symbols = clip.row["phonemes"]
        spoken_F = spoken_phonemes(clip.ends, len(clip.samples) // FRAME_SAMPLES)
        classes = torch.tensor([numbers.setdefault(symbols[index], len(numbers)) for index in spoken_F])
        (heard_TW,) = encoder.encode_audio([Audio(clip.samples, SAMPLING_RATE)])
        found.append((torch.from_numpy(heard_TW.astype(np.float32)), classes))
    return [c for i, c in enumerate(found) if i % 4], [c for i, c in enumerate(found) if i % 4 == 0], len(numbers)


def main() -> None:
    """Both probes with both poolings, and the paired difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--whisper", "--speakers", "--speech"):
        parser.add_argument(name, type=Path, required=True)
    options = parser.parse_args()
    encoder = WhisperEncoder(str(options.whisper), whisper_fingerprint(str(options.whisper)), plan_precision("fp32"))
    phonemes, speakers = phoneme_clips(encoder, options.speech), speaker_clips(encoder, options.speakers)
    for what, (clips, held_out, classes), positions in (
        ("phoneme of a frame", phonemes, None),
        (f"speaker, {SPEAKER_POSITIONS} embeddings", speakers, SPEAKER_POSITIONS),
    ):
        right = {
            kind: np.stack([probe(kind, clips, held_out, classes, positions, seed) for seed in range(SEEDS)]).mean(0)
            for kind in (Mean, Attention)
        }
        ones = np.ones(len(right[Mean]))
        gain = estimate(right[Attention] - right[Mean], ones, median=False)
        scores = ", ".join(f"{kind.__name__.lower()} {value.mean():.3f}" for kind, value in right.items())
        difference = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        print(f"{what} ({classes} classes, {len(ones)} held out, {SEEDS} seeds): {scores}; {difference}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
