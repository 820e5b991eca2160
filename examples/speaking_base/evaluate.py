"""What the base says of the held-out sentences, in voices it knows and in voices it does not.

    python examples/speaking_base/evaluate.py --run run --codes codes --codec codec --tokenizer tokenizer \\
        --speech speech --asr faster-whisper:PATH --output evaluated --most 40

Each sentence has another clip of its voice as the only reference. Voices are told by Resemblyzer: the mean of a voice's
recordings that is nearest to what was generated.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
import torch
from chains import read_codes
from features import read_speech
from model import make_config
from speech import HELD_OUT_VOICES
from train import TrainingFamily
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from write_base import TEMPERATURE, TOP_K, load_average

from speechtune.families.higgs_audio_v2.codec_world import WorldCodec
from speechtune.families.higgs_audio_v2.layout import cut_rows, undelay
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.tasks.voice_cloning.word_errors import word_errors
from speechtune.types import Audio, AudioRef, Clip, GenerationOptions, Sample

MOST_FRAMES = 200
BATCH = 16


@dataclass(frozen=True)
class Prompt:
    """A sentence to say, and the recording of it."""

    group: str
    voice: str
    sample: Sample
    reference: np.ndarray
    recorded_frames: int


def read_prompts(codes: Path, most: int) -> list[Prompt]:
    """Held-out sentences, `most` in known and as many in unknown voices."""
    references: dict[str, list[tuple[str, np.ndarray]]] = {}
    wanted: list[tuple[dict[str, Any], int]] = []
    for shard in sorted(codes.glob("kokoro-*.npz")):
        for row, codes_FK, places in read_codes(shard):
            if row["split"] == "held_out":
                wanted.append((row, len(places)))
            if row["split"] == "reference" or (row["split"] == "train" and row["voice"] not in HELD_OUT_VOICES):
                references.setdefault(row["voice"], []).append((row["text"], codes_FK))
            elif row["split"] == "held_out":  # until there are clips of their own
                references.setdefault(f"held out {row['voice']}", []).append((row["text"], codes_FK))
    prompts, counts = [], {"known": 0, "unknown": 0}
    for row, frames in wanted:
        group = "unknown" if row["voice"] in HELD_OUT_VOICES else "known"
        own = references.get(row["voice"]) or references[f"held out {row['voice']}"]
        others = [reference for reference in own if reference[0] != row["text"]]
        if counts[group] < most and others:
            text, codes_FK = random.Random(row["name"]).choice(others)
            clip = AudioRef(data=b"reference")
            sample = Sample(row["name"], row["text"], None, (Clip(clip, text),))
            prompts.append(Prompt(group, row["voice"], sample, codes_FK, frames))
            counts[group] += 1
    return prompts


def nearest_voice(made_ND: np.ndarray, recordings: list[tuple[str, Audio]], speaker: Any) -> list[str]:
    """The voice whose recordings are nearest to each clip."""
    by_voice: dict[str, list[Audio]] = {}
    for voice, audio in recordings:
        by_voice.setdefault(voice, []).append(audio)
    names = sorted(by_voice)
    means_VD = np.stack([speaker.embed(by_voice[name]).mean(axis=0) for name in names])
    means_VD /= np.linalg.norm(means_VD, axis=1, keepdims=True)
    return [names[index] for index in (made_ND @ means_VD.T).argmax(axis=1)]


def summarize(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Figures over the sentences of one group of voices."""
    return {
        "sentences": len(lines),
        "wer": round(sum(line["wrong"] for line in lines) / sum(line["words"] for line in lines), 3),
        "stop_rate": round(float(np.mean([line["stopped"] for line in lines])), 3),
        "duration_ratio": round(float(np.mean([line["duration_ratio"] for line in lines])), 3),
        "voice_is_nearest": round(float(np.mean([line["voice"] == line["nearest"] for line in lines])), 3),
    }


def main() -> None:
    """Generate, transcribe, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--run", "--codes", "--codec", "--tokenizer", "--speech", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--asr", required=True)
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    arguments = parser.parse_args()
    codec = WorldCodec(str(arguments.codec))
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(arguments.tokenizer))
    config = make_config(tokenizer, codec, arguments.hidden, arguments.layers)
    family = TrainingFamily(config, tokenizer)
    model = load_average(arguments.run, config, codec)
    prompts = read_prompts(arguments.codes, arguments.most)
    options = GenerationOptions(temperature=arguments.temperature, top_k=TOP_K, max_new_tokens=MOST_FRAMES, seed=0)
    made: list[tuple[np.ndarray, bool]] = []
    for start in range(0, len(prompts), BATCH):
        batch = [(prompt.sample, [prompt.reference]) for prompt in prompts[start : start + BATCH]]
        eos = config.audio_stream_eos_id
        rows_BRK = family.generate_rows(model, batch, options)
        made += [undelay(cut_rows(rows_RK, eos), eos, codec.codebook_size) for rows_RK in rows_BRK]
        print(f"{len(made)} of {len(prompts)}", flush=True)
    audios = codec.decode([codes_FK if len(codes_FK) > 2 else np.zeros((3, 8), np.int16) for codes_FK, _ in made])
    scorers = load_scorers(arguments.asr, "resemblyzer", None)
    assert scorers.asr is not None and scorers.speaker is not None
    transcripts = scorers.asr.transcribe(audios, ["en"] * len(audios))
    made_ND = scorers.speaker.embed(audios)
    recordings = [
        (clip.row["voice"], Audio(clip.samples, codec.sampling_rate))
        for shard in sorted(arguments.speech.glob("kokoro-*.npz"))[:8]
        for clip in read_speech(shard)
        if "+" not in clip.row["voice"]
    ]
    nearest = nearest_voice(made_ND, recordings, scorers.speaker)
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, prompt in enumerate(prompts):
        wrong, words = word_errors(prompt.sample.text, transcripts[index], "en")
        codes_FK, stopped = made[index]
        lines.append(
            {
                "name": prompt.sample.id, "group": prompt.group, "voice": prompt.voice, "text": prompt.sample.text,
                "transcript": transcripts[index], "wrong": wrong, "words": words, "stopped": stopped,
                "nearest": nearest[index], "duration_ratio": len(codes_FK) / prompt.recorded_frames,
            }
        )  # fmt: skip
        soundfile.write(arguments.output / f"{prompt.sample.id}.wav", audios[index].samples, codec.sampling_rate)
    groups = {group: [line for line in lines if line["group"] == group] for group in ("known", "unknown")}
    summary = {group: summarize(own) for group, own in groups.items() if own}
    print(json.dumps(summary))
    (arguments.output / "results.json").write_text(json.dumps([summary, *lines], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
