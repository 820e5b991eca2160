"""Evidence for the thresholds of `speechtune prepare`: what its measures say of clips damaged on purpose.

    python bench/prepare_thresholds.py DEMO_VOICES SPEECHOCEAN --asr faster-whisper:FOLDER

Two clips of every speaker are measured as they are, with white noise at 20, 10 and 5 dB, clipped, low-passed, and with
a second speaker mixed in. A row of the table is a damage: of each measure the median and the range of nine clips in
ten, and the share of clips that the defaults reject by it.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.signal import butter, sosfiltfilt

from speechtune.audio import read_audio
from speechtune.family import Scorers
from speechtune.preparation.loudness import normalise
from speechtune.preparation.quality import measure
from speechtune.preparation.settings import PrepareConfig
from speechtune.preparation.transcribe import transcribe
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.types import Audio, AudioRef

CLIPS_PER_SPEAKER = 6  # whose mean is the voice
MEASURED_PER_SPEAKER = 2
RATE = 16_000
Damage = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Voice:
    """Clips of one speaker."""

    name: str
    language: str
    clips: list[np.ndarray]


def noise(snr_db: float) -> Damage:
    """White noise so far below the clip's mean power."""

    def damage(clip: np.ndarray, other: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return clip + random.standard_normal(len(clip)) * np.sqrt((clip**2).mean()) * 10 ** (-snr_db / 20)

    return damage


def clipping(gain_db: float) -> Damage:
    """The clip raised so far above its peak and cut off there, then made quieter again."""

    def damage(clip: np.ndarray, other: np.ndarray, random: np.random.Generator) -> np.ndarray:
        peak = np.abs(clip).max() * 10 ** (-gain_db / 20)
        return np.clip(clip, -peak, peak)

    return damage


def low_pass(cutoff_hz: float) -> Damage:
    """Nothing above a frequency."""

    def damage(clip: np.ndarray, other: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return sosfiltfilt(butter(8, cutoff_hz, fs=RATE, output="sos"), clip)

    return damage


def second_speaker(level_db: float) -> Damage:
    """Another speaker's clip on top, so much quieter."""

    def damage(clip: np.ndarray, other: np.ndarray, random: np.random.Generator) -> np.ndarray:
        other = np.resize(other, len(clip))
        return clip + other * np.sqrt((clip**2).mean() / (other**2).mean()) * 10 ** (-level_db / 20)

    return damage


DAMAGES: dict[str, Damage] = {
    "none": lambda clip, other, random: clip,
    "noise, 20 dB": noise(20),
    "noise, 10 dB": noise(10),
    "noise, 5 dB": noise(5),
    "clipped, 6 dB": clipping(6),
    "clipped, 12 dB": clipping(12),
    "low-pass, 4 kHz": low_pass(4000),
    "low-pass, 2 kHz": low_pass(2000),
    "second speaker, 10 dB": second_speaker(10),
    "second speaker, 0 dB": second_speaker(0),
}


def read_voices(demo_voices: Path, speechocean: Path | None, count: int) -> list[Voice]:
    """Speakers with some clips each: all of demo-voices, and `count` of Speechocean762's training part."""
    places: dict[tuple[str, str], list[Path]] = {}
    for line in (demo_voices / "clips.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        places.setdefault((row["speaker"], row["language"]), []).append(demo_voices / row["audio"])
    if speechocean is not None:
        rows = (line.split() for line in (speechocean / "train" / "utt2spk").read_text().splitlines())
        speakers = dict(row for row in rows if row)
        scp = dict(line.split() for line in (speechocean / "train" / "wav.scp").read_text().splitlines() if line)
        for speaker in sorted(set(speakers.values()))[:count]:
            places[f"so-{speaker}", "en"] = [speechocean / scp[u] for u, s in speakers.items() if s == speaker]
    return [
        Voice(name, language, [read_audio(AudioRef(str(p)), RATE).samples for p in paths[:CLIPS_PER_SPEAKER]])
        for (name, language), paths in places.items()
    ]


def measured(voices: Sequence[Voice], scorers: Scorers, config: PrepareConfig) -> dict[str, dict[str, list[float]]]:
    """Damage -> measure -> a value for each clip."""
    assert scorers.asr and scorers.speaker and scorers.mos
    random = np.random.default_rng(0)
    rate = config.output.sampling_rate
    found: dict[str, dict[str, list[float]]] = {name: {} for name in DAMAGES}
    means = []
    for voice in voices:
        embedded = scorers.speaker.embed([Audio(clip.astype(np.float32), RATE) for clip in voice.clips])
        means.append(embedded.mean(axis=0) / np.linalg.norm(embedded.mean(axis=0)))
    for number, voice in enumerate(voices):
        others = voices[(number + 1) % len(voices)].clips
        for place, clip in enumerate(voice.clips[:MEASURED_PER_SPEAKER]):
            other = others[place % len(others)]
            for name, damage in DAMAGES.items():
                damaged = damage(clip.astype(np.float64), other.astype(np.float64), random).astype(np.float32)
                audio, loudness = normalise(Audio(damaged, RATE), rate, config.loudness)
                quality = measure(audio, loudness.gain_db, scorers.mos)
                values = {"snr_db": quality.snr_db, "clipping": loudness.clipping, "mos": quality.mos or np.nan}
                values["similarity"] = float(scorers.speaker.embed([audio])[0] @ means[number])
                if voice.language == "en":
                    values["confidence"] = transcribe(scorers.asr, audio, "en").confidence or 0.0
                for key, value in values.items():
                    found[name].setdefault(key, []).append(value)
        print(f"{voice.name} measured", flush=True)
    return found


def table(found: dict[str, dict[str, list[float]]], config: PrepareConfig) -> list[str]:
    """Lines of Markdown: median, range of nine in ten, and the share rejected."""
    bad: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "snr_db": lambda v: v < config.quality.min_snr_db,
        "clipping": lambda v: v > config.quality.max_clipping,
        "mos": lambda v: v < config.quality.min_mos,
        "similarity": lambda v: v < config.speakers.min_similarity,
        "confidence": lambda v: v < config.transcribe.min_confidence,
    }
    lines = ["| damage | " + " | ".join(bad) + " |", "|---" * (len(bad) + 1) + "|"]
    for name, measures in found.items():
        cells = []
        for key, rejects in bad.items():
            values = np.array(measures[key])
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
            cells.append(f"{middle:.3g} ({low:.3g} to {high:.3g}), {rejects(values).mean():.0%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo_voices", type=Path)
    parser.add_argument("speechocean", type=Path, nargs="?")
    parser.add_argument("--speakers", type=int, default=6, help="of Speechocean762 (default: %(default)s)")
    parser.add_argument("--asr", required=True)
    parser.add_argument("--out", type=Path, help="JSON file of all values")
    given = parser.parse_args()
    config = PrepareConfig()
    voices = read_voices(given.demo_voices, given.speechocean, given.speakers)
    found = measured(voices, load_scorers(given.asr, config.speakers.encoder, config.quality.mos), config)
    if given.out:
        given.out.write_text(json.dumps(found), encoding="utf-8")
    print("\n".join(table(found, config)))


if __name__ == "__main__":
    main()
