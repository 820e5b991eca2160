"""What the kept clips are for: training or evaluation, and which clip is whose reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speechtune.data.chatml import INSTRUCTION
from speechtune.data.splits import split_samples
from speechtune.data.text_checks import plain
from speechtune.preparation.settings import SelectSettings
from speechtune.types import Sample


@dataclass(frozen=True, slots=True)
class KeptClip:
    """A clip that is kept, as it is written; `quality` orders references."""

    id: str
    audio: str
    text: str
    seconds: float
    language: str | None
    quality: float


def hold_out(clips: Sequence[KeptClip], settings: SelectSettings) -> set[str]:
    """Ids of the clips set aside: all takes of some sentences, chosen by seed; none of a single sentence."""
    sentences = [Sample(text, text, None) for text in dict.fromkeys(plain(clip.text) for clip in clips)]
    if len(sentences) < 2:
        return set()
    held = {sample.id for sample in split_samples(sentences, settings.held_out, settings.seed)[1]}
    return {clip.id for clip in clips if plain(clip.text) in held}


def choose_references(
    clips: Sequence[KeptClip], held: set[str], settings: SelectSettings
) -> Mapping[str, KeptClip | None]:
    """A reference for each clip, all of one speaker: another sentence, not held out, 3 to 8 s, of the better half.

    They take turns, so that no clip is the reference of many. Where none has that length the nearest to it serves.
    """
    low, high = settings.reference_min_seconds, settings.reference_max_seconds
    usable = [clip for clip in clips if clip.id not in held]
    ranked = sorted(
        usable, key=lambda clip: (max(low - clip.seconds, clip.seconds - high, 0.0), -clip.quality, clip.id)
    )
    fitting = [clip for clip in ranked if low <= clip.seconds <= high]
    lenders = fitting[: max(2, (len(fitting) + 1) // 2)] if len(fitting) > 1 else ranked
    chosen: dict[str, KeptClip | None] = {}
    for turn, clip in enumerate(clips):
        order = [lenders[(turn + step) % len(lenders)] for step in range(len(lenders))]
        chosen[clip.id] = next((lender for lender in order if plain(lender.text) != plain(clip.text)), None)
    return chosen


def chat_row(clip: KeptClip, reference: KeptClip | None, speaker: str) -> dict[str, object]:
    """A row of ChatML as docs/data.md describes it."""
    asked: list[dict[str, str]] = [{"type": "text", "text": f"{INSTRUCTION} {clip.text}" if reference else clip.text}]
    if reference:
        asked = [{"type": "text", "text": reference.text}, {"type": "audio", "audio_url": reference.audio}, *asked]
    answer = [{"type": "text", "text": clip.text}, {"type": "audio", "audio_url": clip.audio}]
    return {
        "id": clip.id,
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        "speaker": speaker,
        "misc": {"language": clip.language},
    }
