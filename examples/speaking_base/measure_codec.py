"""What the codec costs: word errors, likeness of the voice and quality, before and after, and which entries it uses.

    python examples/speaking_base/measure_codec.py --clips speech/kokoro-0000?.npz --codec codec \\
        --asr faster-whisper:PATH --output measured.json

Clips are shards of speech (those of held-out voices in them), or a JSON-lines manifest with `audio` and `text`.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from features import read_speech
from speech import HELD_OUT_VOICES

from speechtune.audio import read_audio
from speechtune.families.higgs_audio_v2.codec_world import SAMPLING_RATE, WorldCodec, analyse, synthesise
from speechtune.tasks.voice_cloning.measures import cosine
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.tasks.voice_cloning.word_errors import word_errors
from speechtune.types import Audio, AudioRef


@dataclass(frozen=True)
class Recording:
    """A clip to measure on."""

    voice: str
    text: str
    audio: Audio


def read_recordings(paths: list[Path], voices: tuple[str, ...], most: int) -> list[Recording]:
    """Held-out sentences of shards, or the lines of a manifest."""
    found: list[Recording] = []
    for path in paths:
        if path.suffix == ".npz":
            for clip in read_speech(path):
                if clip.row["voice"] in voices and clip.row["split"] == "held_out":
                    found.append(Recording(clip.row["voice"], clip.row["text"], Audio(clip.samples, SAMPLING_RATE)))
        else:
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                audio = read_audio(AudioRef(str(path.parent / row["audio"])), SAMPLING_RATE)
                found.append(Recording(str(row.get("speaker", "")), row["text"], audio))
    return found[:most]


def perplexities(codes_FK: np.ndarray) -> list[float]:
    """How many entries of each codebook are used as if evenly: exp of the entropy."""
    found = []
    for codes_F in codes_FK.T:
        shares = np.bincount(codes_F) / len(codes_F)
        shares = shares[shares > 0]
        found.append(round(float(np.exp(-(shares * np.log(shares)).sum())), 1))
    return found


def measure(
    recordings: list[Recording], versions: list[Audio], scorers: Any, originals_ND: np.ndarray
) -> dict[str, float | None]:
    """WER, likeness to the same clip, to other clips of the voice and to other voices, MOS."""
    transcripts = scorers.asr.transcribe(versions, ["en"] * len(versions))
    counts = [word_errors(r.text, text, "en") for r, text in zip(recordings, transcripts, strict=True)]
    made_ND = scorers.speaker.embed(versions)
    alike_NN = made_ND @ originals_ND.T
    same_NN = np.array([[a.voice == b.voice for b in recordings] for a in recordings])
    itself_NN = np.eye(len(recordings), dtype=bool)
    result = {
        "wer": round(sum(wrong for wrong, _ in counts) / sum(words for _, words in counts), 4),
        "likeness_same_clip": round(float(cosine(made_ND, originals_ND).mean()), 3),
        "likeness_same_voice": round(float(alike_NN[same_NN & ~itself_NN].mean()), 3),
        "likeness_other_voices": round(float(alike_NN[~same_NN].mean()), 3) if (~same_NN).any() else None,
    }
    if scorers.mos is not None:
        result["mos"] = round(float(np.mean(scorers.mos.predict(versions))), 2)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=Path, nargs="+", required=True)
    parser.add_argument("--codec", type=Path, nargs="*", default=[])
    parser.add_argument("--asr", required=True)
    parser.add_argument("--mos")
    parser.add_argument("--most", type=int, default=100)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    recordings = read_recordings(arguments.clips, HELD_OUT_VOICES, arguments.most)
    scorers = load_scorers(arguments.asr, "resemblyzer", arguments.mos)
    originals = [recording.audio for recording in recordings]
    assert scorers.speaker is not None
    originals_ND = scorers.speaker.embed(originals)
    analysed = [analyse(audio.samples) for audio in originals]
    results: dict[str, Any] = {"clips": len(recordings), "voices": len({r.voice for r in recordings})}
    results["recording"] = measure(recordings, originals, scorers, originals_ND)
    print(json.dumps(results), flush=True)
    plain = [Audio(synthesise(features), SAMPLING_RATE) for features in analysed]
    results["WORLD"] = measure(recordings, plain, scorers, originals_ND)
    print("WORLD", json.dumps(results["WORLD"]), flush=True)
    for place in arguments.codec:
        codec = WorldCodec(str(place))
        codes = [codec.quantise(features) for features in analysed]
        result = measure(recordings, codec.decode(codes), scorers, originals_ND)
        results[place.name] = {**result, "perplexity": perplexities(np.concatenate(codes))}
        print(place.name, json.dumps(results[place.name]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
