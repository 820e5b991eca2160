"""Speech in quantity: two free models say the sentences, and tell when each phoneme ends.

Kokoro-82M has many voices and takes a second a clip. hibari, distilled from one of its voices, is a hundred times
faster: most of what a model needs to learn to read is made with it. Writes shards of clips (int16 at 24 kHz, phonemes,
phoneme ends); a run that was killed goes on where it stopped.

    python examples/speaking_base/speech.py --assets assets --output speech --part 0 --parts 2

`--assets` is a folder with `kokoro.onnx` (Kokoro-82M v1.0, int8), `vocab.json` (ids of its phonemes) and `voices/*.bin`
(float32 style vectors); see README.md for where they come from.
"""

import argparse
import gzip
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from float_convolutions import with_float_convolutions
from hibari import Hibari, dsp
from sentences import Grammar, held_out_sentences, training_sentences

SAMPLING_RATE = 24_000
SAMPLES_PER_DURATION = 600  # the unit of the encoder's durations
KOKORO_DURATIONS = "/encoder/Clip_output_0"  # the graph's tensor that holds them
HIBARI_DURATIONS = "/Clip_output_0"
HIBARI_VOICE = "af_heart"
HELD_OUT_VOICES = ("af_bella", "am_michael", "bf_isabella", "bm_fable")
VOICES = (  # of Kokoro
    "af_alloy", "af_aoede", "af_jessica", "af_kore", "af_nicole", "af_nova", "af_river", "af_sarah",
    "af_sky", "am_adam", "am_echo", "am_eric", "am_fenrir", "am_liam", "am_onyx", "am_puck", "am_santa", "bf_alice",
    "bf_emma", "bf_lily", "bm_daniel", "bm_george", "bm_lewis",
)  # fmt: skip
NUM_BLENDS, BLEND_SHARE = 96, 0.6
SHARD_CLIPS = 32
MEASURED_SENTENCES = 64  # of those held out, each in a known voice and in a held-out one
REFERENCE_CLIPS = 10  # further clips of each held-out voice, to prompt with
SEED = 7


@dataclass(frozen=True)
class Job:
    """A clip to make."""

    name: str
    split: str  # train, held_out (sentence), reference (of a held-out voice)
    voice: str
    text: str


def blends() -> dict[str, tuple[str, str, float]]:
    """Further voices: two style vectors and the share of the first."""
    draw = random.Random(SEED)
    made: dict[str, tuple[str, str, float]] = {}
    while len(made) < NUM_BLENDS:
        first, second = sorted(draw.sample(VOICES, 2))
        made.setdefault(f"{first}+{second}", (first, second, draw.uniform(0.35, 0.65)))
    return made


def jobs(counts: dict[str, int], dictionary: Sequence[str]) -> dict[str, list[Job]]:
    """All clips by the model that says them: first those to measure with, then the training data."""
    held = held_out_sentences()
    kokoro = []
    for index, text in enumerate(held[:MEASURED_SENTENCES]):
        kokoro.append(Job(f"seen-{index}", "held_out", VOICES[index % len(VOICES)], text))
        kokoro.append(Job(f"new-{index}", "held_out", HELD_OUT_VOICES[index % len(HELD_OUT_VOICES)], text))
    references = Grammar(SEED + 1).different(REFERENCE_CLIPS, {text.lower() for text in held})
    kokoro += [Job(f"{v}-{i}", "reference", v, text) for v in HELD_OUT_VOICES for i, text in enumerate(references)]
    texts = training_sentences(sum(counts.values()), dictionary)
    draw, blended = random.Random(SEED + 2), list(blends())
    for index, text in enumerate(texts[: counts["kokoro"]]):
        voice = draw.choice(blended) if draw.random() < BLEND_SHARE else draw.choice(VOICES)
        kokoro.append(Job(f"kokoro-{index}", "train", voice, text))
    hibari = [Job(f"hibari-{i}", "train", HIBARI_VOICE, text) for i, text in enumerate(texts[counts["kokoro"] :])]
    return {"hibari": hibari, "kokoro": kokoro}


Said = tuple[np.ndarray, str, np.ndarray]  # samples (int16), phonemes, the sample at which each phoneme ends


def load_with_durations(path: Path | str, durations: str) -> Any:
    """An ONNX model with one more output."""
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(durations))
    return model


def session_on(model: Any) -> Any:
    """A session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def said(wave: np.ndarray, phonemes: Sequence[str], durations: np.ndarray) -> Said:
    """What a model said; the durations have one pad in front of the phonemes and one behind."""
    samples = np.clip(np.asarray(wave, np.float32).ravel() * 32767, -32768, 32767).astype(np.int16)
    ends = np.cumsum(np.asarray(durations).ravel()[:-1])[1:] * SAMPLES_PER_DURATION
    return samples, "".join(phonemes), ends.astype(np.int32)


class Heart:
    """hibari's voice."""

    def __init__(self) -> None:
        self.model = Hibari()
        self.session = session_on(load_with_durations(self.model.model_path, HIBARI_DURATIONS))

    def say(self, job: Job) -> Said:
        """The job's text, at a pace drawn from its name."""
        phonemes = [symbol for symbol in self.model.g2p(job.text) if symbol in self.model.vocab]
        draw = random.Random(job.name)
        inputs = {
            "ids": np.array([[0, *(self.model.vocab[symbol] for symbol in phonemes), 0]], np.int64),
            "speed": np.array([draw.uniform(1.0, 1.2)], np.float32),
        }
        *parts, durations = self.session.run(None, inputs)
        wave = dsp.synth(*(part[0] for part in parts), np.random.default_rng(draw.getrandbits(32)))
        return said(wave, phonemes, durations)


class Kokoro:
    """The model of many voices, on one thread; in float32: bf16 is twice as fast and ruins the phases of the pitch."""

    def __init__(self, assets: Path) -> None:
        self.ids: dict[str, int] = json.loads((assets / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        graph = with_float_convolutions(load_with_durations(assets / "kokoro.onnx", KOKORO_DURATIONS))
        self.session = session_on(graph)
        self.phonemize = Hibari().g2p
        self.assets, self.styles, self.blends = assets, dict[str, np.ndarray](), blends()

    def style(self, voice: str) -> np.ndarray:
        """Style vectors of a voice by number of phonemes, of shape (510, 256)."""
        if voice not in self.styles:
            if voice in self.blends:
                first, second, share = self.blends[voice]
                self.styles[voice] = share * self.style(first) + (1 - share) * self.style(second)
            else:
                self.styles[voice] = np.fromfile(self.assets / "voices" / f"{voice}.bin", np.float32).reshape(-1, 256)
        return self.styles[voice]

    def say(self, job: Job) -> Said:
        """The job's text, at a pace that is a trait of the voice."""
        phonemes = [symbol for symbol in self.phonemize(job.text) if symbol in self.ids]
        style = self.style(job.voice)[min(len(phonemes), 510) - 1].astype(np.float32)
        inputs = {
            "tokens": np.array([[0, *(self.ids[symbol] for symbol in phonemes), 0]], np.int64),
            "style": style[None],
            "speed": np.array([random.Random(job.voice).uniform(1.0, 1.2)], np.float32),
        }
        wave, durations = self.session.run(None, inputs)
        return said(wave, phonemes, durations)


def write_shard(path: Path, made: Sequence[tuple[Job, Said]]) -> None:
    """Write clips end to end, under another name first."""
    rows: list[dict[str, Any]] = []
    for job, (samples, phonemes, ends) in made:
        rows.append({**asdict(job), "samples": len(samples), "phonemes": phonemes, "num_ends": len(ends)})
    arrays = {
        "samples": np.concatenate([samples for _, (samples, _, _) in made]),
        "ends": np.concatenate([ends for _, (_, _, ends) in made]),
        "rows": np.frombuffer(json.dumps(rows).encode(), np.uint8),
    }
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)


def read_dictionary() -> list[str]:
    """Plain words of the phonemizer's own dictionary."""
    with gzip.open(Path(dsp.__file__).parent / "assets" / "lexicon_us_gold.json.gz", "rt", encoding="utf-8") as file:
        entries = json.load(file)
    return sorted(
        word for word in entries if word.isascii() and word.isalpha() and word.islower() and 3 < len(word) < 10
    )


def main() -> None:
    """Make the shards of one of several processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kokoro", type=int, default=1_400, help="training clips in Kokoro's voices")
    parser.add_argument("--hibari", type=int, default=12_000, help="training clips in hibari's voice")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    started, seconds = time.monotonic(), 0.0
    counts = {"kokoro": arguments.kokoro, "hibari": arguments.hibari}
    for name, own in jobs(counts, read_dictionary()).items():
        speaker = Heart() if name == "hibari" else Kokoro(arguments.assets)
        for shard, first in enumerate(range(0, len(own), SHARD_CLIPS)):
            path = arguments.output / f"{name}-{shard:05d}.npz"
            if shard % arguments.parts != arguments.part or path.exists():
                continue
            made = [(job, speaker.say(job)) for job in own[first : first + SHARD_CLIPS]]
            write_shard(path, made)
            seconds += sum(len(samples) for _, (samples, _, _) in made) / SAMPLING_RATE
            print(f"{path.name}: {seconds:.0f} s of speech in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
