"""What Whisper conditioning does for voices never heard: the same LoRA of the speaking base with it and without.

    python bench/conditioning.py --speech SPEECH --whisper WHISPER --asr faster-whisper:PATH --output OUT

`SPEECH` is what `examples/speaking_base/speech.py` wrote, `WHISPER` what `bench/whisper_from_ctranslate2.py` did. Both
runs see the same samples in the same order, start from the same LoRA, and take the same steps; both adapters then speak
the held-out sentences of the voices that neither the base nor they have heard.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from speechtune.audio import write_wav
from speechtune.families import build_config
from speechtune.families.higgs_audio_v2.tiny import speaking_base
from speechtune.inference.evaluate_voices import evaluate_voices, systems_of
from speechtune.lora.files import FOLDER_NAME
from speechtune.tasks.voice_cloning.comparison import print_comparison
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.training.run import run_training
from speechtune.types import Audio, GenerationOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "speaking_base"))
from features import SAMPLING_RATE, read_speech

TRAINED, PROMPTS = 320, 48


def write_data(speech: Path, folder: Path) -> dict[str, Path]:
    """Clips as wav, and two manifests: training samples, and held-out sentences of held-out voices.

    A voice has one reference: Whisper listens to 30 seconds, however short a clip is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clips: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for shard in sorted(speech.glob("kokoro-*.npz")):
        for clip in read_speech(shard):
            path = folder / f"{clip.row['name']}.wav"
            if not path.exists():
                write_wav(path, Audio(clip.samples, SAMPLING_RATE))
            row = {"audio": str(path.resolve()), "text": clip.row["text"], "speaker": clip.row["voice"]}
            clips[clip.row["split"]][row["speaker"]].append(row)
    voices = list(clips["train"].values())
    training = [
        chatml(own[0], own[index]) for index in range(1, max(map(len, voices))) for own in voices if index < len(own)
    ]
    references = clips["reference"]  # only voices that are held out have such clips
    prompts = [
        chatml(references[voice][0], clips["held_out"][voice][index])
        for index in range(PROMPTS // len(references))
        for voice in references
    ]
    manifests = {"train": training[:TRAINED], "prompts": prompts}
    for name, rows in manifests.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return {name: folder / f"{name}.json" for name in manifests}


def chatml(reference: dict[str, str], target: dict[str, str]) -> dict[str, Any]:
    """A reference turn, and the turn to learn or to speak."""
    messages: list[dict[str, Any]] = []
    for clip in (reference, target):
        audio = [{"type": "audio", "audio_url": clip["audio"]}]
        messages += [{"role": "user", "content": clip["text"]}, {"role": "assistant", "content": audio}]
    return {"messages": messages, "speaker": target["speaker"]}


def train(name: str, data: Path, output: Path, steps: int, conditioning: dict[str, Any]) -> Path:
    """One run; the folder of its adapter."""
    config = build_config(
        {
            "family": "higgs_audio_v2",
            "output_dir": output / name,
            "model": {**speaking_base(), **conditioning},
            "data": {"train": data, "cache_dir": output / "cache"},
            "lora": {"rank": 16, "alpha": 32, "dropout": 0.05},
            "train": {"max_steps": steps, "batch_size": 8, "learning_rate": 8e-4, "warmup_steps": 8},
            "evaluate": {"prompts": 0},
            "checkpoint": {"every_steps": steps, "keep_last": 1, "resume": "auto"},
            "tracking": {"trackers": ()},
        },
        name,
    )
    if not (output / name / "summary.json").is_file():
        run_training(config)
    return output / name / FOLDER_NAME


def main(arguments: Sequence[str] | None = None) -> None:
    """Train twice, speak, score, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--speech", "--whisper", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--asr", required=True)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args(arguments)
    data = write_data(options.speech, options.output / "clips")
    conditioning = {"reference_conditioning": "whisper", "whisper_path": str(options.whisper)}
    adapters = [
        train("without", data["train"], options.output, options.steps, {}),
        train("with", data["train"], options.output, options.steps, conditioning),
    ]
    systems = systems_of(None, adapters, include_base=False)
    scorers = load_scorers(options.asr, "resemblyzer", None)
    comparison = evaluate_voices(
        data["prompts"],
        systems,
        options.output / "spoken",
        scorers,
        cache_dir=options.output / "cache",
        batch_size=12,
        options=GenerationOptions(max_new_tokens=200, seed=1),
    )
    print_comparison(comparison, Console(width=120))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
