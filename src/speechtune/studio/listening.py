"""Speech of a run's base, adapter and checkpoints for the same text, and a blind comparison of two of them."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import nn

from speechtune.commands import require_words
from speechtune.config import RunConfig
from speechtune.errors import ConfigError
from speechtune.families import load_config
from speechtune.family import Family
from speechtune.inference.generate import answer, check_references, provenance, write_output
from speechtune.inference.load import load_model, open_adapter
from speechtune.lora.files import FOLDER_NAME, StoredAdapter
from speechtune.lora.prompts import as_trained
from speechtune.storage.verified_folder import find_checkpoints
from speechtune.studio.form import SHIPPED, start_from
from speechtune.studio.workspace import Workspace
from speechtune.tasks.statistics import Preference, preference
from speechtune.types import AudioRef, Clip, GenerationOptions, Sample

BASE = "base"
VOTES_NAME = "votes.jsonl"
SENTENCES_KEPT = 20  # of speech that was asked for; older ones are removed
Vote = Literal["A", "B", "no difference"]


def voices_of(run: str | None, workspace: Workspace) -> list[str]:
    """Names of what can speak: the base alone, the run's adapter, its checkpoints from new to old."""
    if run in (None, SHIPPED):
        return [BASE]
    folder = workspace.run(run)
    adapters = [FOLDER_NAME] if (folder / FOLDER_NAME).is_dir() else []
    return [BASE, *adapters, *(path.name for _, path in reversed(find_checkpoints(folder)))]


@dataclass(frozen=True)
class Request:
    """What is to be said, and how: by one seed and one strength for every voice; `run` may be `SHIPPED`."""

    run: str | None
    text: str
    reference: str | None = None
    reference_text: str = ""
    strength: float = 1.0
    seed: int = 42
    temperature: float | None = None
    max_new_tokens: int | None = None


def speak(request: Request, voices: Sequence[str], workspace: Workspace) -> Iterator[tuple[str, Path]]:
    """Each voice's speech as a wav file, as soon as it is made.

    Raises SpeechtuneError: as `speechtune generate`.
    """
    require_words("the text", request.text)
    if bool(request.reference) != bool(request.reference_text.strip()):
        raise ConfigError("a recording of the voice and what is said in it belong together")
    if not voices:
        raise ConfigError("choose who speaks")
    clips = ()
    if request.reference:
        clips = (Clip(AudioRef(str(workspace.readable(request.reference))), request.reference_text.strip()),)
    sample = Sample("speech", request.text, None, clips, source="the page")
    check_references([sample])
    folder = _new_folder(workspace)
    _, *adapters = voices_of(request.run, workspace)
    # As the training was asked, the base too: otherwise two prompts would be compared, not two models.
    prompts = as_trained([sample], workspace.run(request.run) / adapters[0]) if adapters else [sample]
    for voice in voices:
        yield voice, _say(request, voice, prompts, folder, workspace)


def _say(request: Request, voice: str, prompts: Sequence[Sample], folder: Path, workspace: Workspace) -> Path:
    run = request.run or SHIPPED
    if voice not in voices_of(run, workspace):
        raise ConfigError(f"{voice}: {run} has no such adapter or checkpoint")
    written = 0 if voice == BASE else (workspace.run(run) / voice).stat().st_mtime_ns
    config, adapter, family, model = _load(run, voice, written, request.strength, workspace)
    options = GenerationOptions(
        temperature=request.temperature, seed=request.seed, max_new_tokens=request.max_new_tokens
    )
    (output,) = answer(family, model, prompts, options, workspace.directory / "cache")
    path = folder / f"{voice}.wav"
    write_output(output, path, provenance(config, adapter))
    return path


@lru_cache(maxsize=1)  # of a large model a second copy may not fit
def _load(
    run: str, voice: str, written: int, strength: float, workspace: Workspace
) -> tuple[RunConfig, StoredAdapter | None, Family, nn.Module]:
    """What speaks; `written` is when its folder was, so that one that a resumed run has written anew is read anew."""
    config = start_from(SHIPPED, workspace) if run == SHIPPED else load_config(workspace.run(run) / "config.yaml")
    adapter = None
    if voice != BASE and config.lora.enabled:
        adapter = open_adapter(workspace.run(run) / voice, strength)
    elif voice != BASE:  # a checkpoint of full fine-tuning is a model
        model = config.model.model_copy(update={"path": str(workspace.run(run) / voice)})
        config = config.model_copy(update={"model": model})
    return config, adapter, *load_model(config, adapter, ability="speak")


def _new_folder(workspace: Workspace) -> Path:
    root = workspace.directory / "listening"
    root.mkdir(parents=True, exist_ok=True)
    numbers = sorted(int(path.name) for path in root.iterdir() if path.name.isdecimal())
    for number in numbers[: max(0, len(numbers) - SENTENCES_KEPT + 1)]:
        for path in (root / str(number)).glob("*.wav"):
            path.unlink()
        (root / str(number)).rmdir()
    folder = root / str(numbers[-1] + 1 if numbers else 1)
    folder.mkdir()
    return folder


@dataclass(frozen=True)
class Pair:
    """Two voices of a run saying the same, in an order that the listener does not know: the first is called A."""

    run: str
    voices: tuple[str, str]
    clips: tuple[Path, Path]
    text: str
    seed: int
    strength: float


def blind_pair(request: Request, first: str, second: str, workspace: Workspace) -> Pair:
    """Let two voices speak, and shuffle them.

    Raises ConfigError: they are the same one.
    """
    if first == second:
        raise ConfigError("choose two different voices to compare")
    made = list(speak(request, [first, second], workspace))
    random.SystemRandom().shuffle(made)
    (one, clip), (other, other_clip) = made
    # A name would tell which is which.
    hidden = tuple(path.rename(path.with_name(name)) for path, name in ((clip, "A.wav"), (other_clip, "B.wav")))
    return Pair(
        request.run or SHIPPED, (one, other), (hidden[0], hidden[1]), request.text, request.seed, request.strength
    )


def vote(pair: Pair, answer: Vote, workspace: Workspace) -> None:
    """Keep what a listener preferred."""
    preferred = {"A": pair.voices[0], "B": pair.voices[1]}.get(answer)
    row = asdict(pair) | {"clips": [str(clip) for clip in pair.clips], "preferred": preferred}
    with (workspace.directory / "listening" / VOTES_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def tally(run: str | None, first: str, second: str, workspace: Workspace) -> Preference:
    """How often either of two voices of a run was preferred, over all votes that were kept."""
    rows: list[Mapping[str, Any]] = []
    file = workspace.directory / "listening" / VOTES_NAME
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        row = json.loads(line)
        if row["run"] == (run or SHIPPED) and set(row["voices"]) == {first, second}:
            rows.append(row)
    preferred = [row["preferred"] for row in rows]
    return preference(preferred.count(first), preferred.count(second), preferred.count(None))
