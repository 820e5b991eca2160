"""Generated speech -> one row of figures per utterance, their summary, and sentences that say what looks wrong.

WER and similarity as in seed-tts-eval (see `word_errors`): what a recogniser heard against the text, and the
cosine of speaker embeddings of the output and of the reference voice. What gives no sound counts as the worst value of
each figure, and its row says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speechtune.audio import find_defects
from speechtune.family import Scorers, SpeakerEncoder
from speechtune.tasks.statistics import ratio
from speechtune.tasks.voice_cloning.word_errors import language_code, word_errors
from speechtune.types import Audio, Output, Sample

WORST_SIM, WORST_MOS = 0.0, 1.0
"""What an output without sound counts for; its WER is 1, every word deleted."""
LEAST_STOP_RATE, STOP_RATE_FALL = 0.5, 0.25
WER_FACTOR, WER_RISE = 2.0, 0.05
SIM_FALL, MOS_FALL = 0.05, 0.5
DURATION_FACTOR = 3.0


@dataclass(frozen=True, slots=True)
class VoiceRow:
    """Figures of one output; None is what was not measured.

    Attributes:
        heard: what the recogniser heard, as it wrote it.
        wer: word errors over words, after normalisation; None also where the text holds no word.
        word_errors: substitutions, deletions and insertions together.
        words: of the normalised text; characters where the language divides no words.
        sim: cosine to the reference voice; None also where there is no reference.
        mos: predicted, from 1 to 5.
        stopped: the model ended by itself, not by the length cap.
        seconds: duration of the output.
        duration_ratio: `seconds` over those of the target recording; None where there is none.
        problem: why there is nothing to hear: "no audio", "empty", "not finite", "silent"; the row then holds the worst
            values. None for sound.
        note: what was not measured, and why.
        audio: path of the wav, where one was written.
        system: who spoke, in comparisons.
    """

    id: str
    speaker: str | None
    language: str | None
    text: str
    heard: str | None
    wer: float | None
    word_errors: int | None
    words: int | None
    sim: float | None
    mos: float | None
    stopped: bool
    seconds: float
    duration_ratio: float | None
    problem: str | None = None
    note: str | None = None
    audio: str | None = None
    system: str = ""


def measure(
    samples: Sequence[Sample],
    outputs: Sequence[Output],
    references: Sequence[Audio | None],
    targets: Sequence[Audio | None],
    scorers: Scorers,
) -> list[VoiceRow]:
    """Score every output; none is dropped.

    Args:
        samples: what was to be said.
        outputs: in the same order.
        references: the voice each output is compared with.
        targets: the recording of the same text, for durations.
        scorers: those that are None leave their figures None.

    Raises:
        ValueError: different lengths, or outputs in another order.
    """
    lengths = {len(samples), len(outputs), len(references), len(targets)}
    if len(lengths) > 1 or any(s.id != o.sample_id for s, o in zip(samples, outputs, strict=True)):
        raise ValueError("samples, outputs, references and targets do not belong together")
    problems = [problem_of(output.audio) for output in outputs]
    heard = _hear(samples, outputs, problems, scorers)
    sims = _similarities(outputs, references, problems, scorers.speaker)
    mos = _opinions(outputs, problems, scorers)
    rows = []
    for i, (sample, output, target) in enumerate(zip(samples, outputs, targets, strict=True)):
        text = heard[i]
        errors, words = (None, None) if text is None else word_errors(sample.text, text, sample.language)
        seconds = output.audio.duration_seconds if output.audio is not None else 0.0
        row = VoiceRow(
            id=sample.id,
            speaker=sample.speaker,
            language=sample.language,
            text=sample.text,
            heard=text,
            wer=errors / words if errors is not None and words else None,
            word_errors=errors,
            words=words,
            sim=sims[i],
            mos=mos[i],
            stopped=output.stopped,
            seconds=seconds,
            duration_ratio=seconds / target.duration_seconds if target is not None and len(target.samples) else None,
            problem=problems[i],
            note=_note(text, words, sample, scorers),
        )
        rows.append(row)
    return rows


def problem_of(audio: Audio | None) -> str | None:
    """Why there is nothing to hear; None where there is."""
    if audio is None:
        return "no audio"
    if not len(audio.samples):
        return "empty"
    codes = {code for code, _ in find_defects(audio)}
    return "not finite" if "not_finite" in codes else "silent" if "silent" in codes else None


def _hear(
    samples: Sequence[Sample], outputs: Sequence[Output], problems: Sequence[str | None], scorers: Scorers
) -> list[str | None]:
    """What was heard; "" for an output without sound, None where no recogniser knows the language."""
    asr = scorers.asr
    if asr is None:
        return [None] * len(samples)
    heard: list[str | None] = [""] * len(samples)
    chosen: list[tuple[int, Audio]] = []
    for i, (sample, output) in enumerate(zip(samples, outputs, strict=True)):
        if not _knows(asr.languages, sample.language):
            heard[i] = None
        elif output.audio is not None and problems[i] is None:
            chosen.append((i, output.audio))
    texts = asr.transcribe([audio for _, audio in chosen], [samples[i].language for i, _ in chosen])
    for (i, _), text in zip(chosen, texts, strict=True):
        heard[i] = text
    return heard


def _knows(languages: frozenset[str] | None, language: str | None) -> bool:
    return languages is None or language is None or language_code(language) in languages


def _note(heard: str | None, words: int | None, sample: Sample, scorers: Scorers) -> str | None:
    if scorers.asr is not None and heard is None:
        return f"no WER: {scorers.asr.name} does not know {sample.language!r}"
    return "no WER: the normalised text holds no word" if words == 0 else None


def _similarities(
    outputs: Sequence[Output],
    references: Sequence[Audio | None],
    problems: Sequence[str | None],
    encoder: SpeakerEncoder | None,
) -> list[float | None]:
    sims: list[float | None] = [None] * len(outputs)
    if encoder is None:
        return sims
    spoken: list[tuple[int, Audio]] = []
    voices: dict[tuple[int, bytes], Audio] = {}  # many prompts share a voice; each recording is embedded once
    for i, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        if reference is None or problem_of(reference) is not None:
            continue
        if output.audio is None or problems[i] is not None:
            sims[i] = WORST_SIM
        else:
            spoken.append((i, output.audio))
            voices.setdefault(_key(reference), reference)
    if not spoken:
        return sims
    embedded = dict(zip(voices, encoder.embed(list(voices.values())), strict=True))
    wanted = np.stack([embedded[_key(reference)] for i, _ in spoken if (reference := references[i]) is not None])
    found = encoder.similarity(encoder.embed([audio for _, audio in spoken]), wanted)
    for (i, _), value in zip(spoken, found, strict=True):
        sims[i] = float(value)
    return sims


def _key(audio: Audio) -> tuple[int, bytes]:
    return audio.sampling_rate, audio.samples.tobytes()


def _opinions(outputs: Sequence[Output], problems: Sequence[str | None], scorers: Scorers) -> list[float | None]:
    if scorers.mos is None:
        return [None] * len(outputs)
    pairs = zip(outputs, problems, strict=True)
    audios = [output.audio for output, problem in pairs if output.audio is not None and problem is None]
    values = iter(scorers.mos.predict(audios))
    return [WORST_MOS if problem is not None else float(next(values)) for problem in problems]


def summarise(rows: Sequence[VoiceRow]) -> dict[str, float]:
    """Figures over rows; a figure that no row has is left out.

    Returns:
        wer: errors over words of all rows together.
        wer_mean: mean of the rows' own WERs, which is what seed-tts-eval reports.
        sim, mos: means.
        stop_rate: share that ended by itself.
        duration_ratio: median.
        silence_rate: share with nothing to hear.
    """
    found: dict[str, float] = {}
    if not rows:
        return found
    wers = [row.wer for row in rows if row.wer is not None]
    if wers:
        found["wer"] = ratio(sum(row.word_errors or 0 for row in rows), sum(row.words or 0 for row in rows))
        found["wer_mean"] = math.fsum(wers) / len(wers)
    measures: dict[str, Callable[[VoiceRow], float | None]] = {"sim": lambda row: row.sim, "mos": lambda row: row.mos}
    for name, value in measures.items():
        values = [number for row in rows if (number := value(row)) is not None]
        if values:
            found[name] = math.fsum(values) / len(values)
    found["stop_rate"] = sum(row.stopped for row in rows) / len(rows)
    ratios = [row.duration_ratio for row in rows if row.duration_ratio is not None]
    if ratios:
        found["duration_ratio"] = statistics.median(ratios)
    found["silence_rate"] = sum(row.problem is not None for row in rows) / len(rows)
    return found


def warnings_of(summary: Mapping[str, float], baseline: Mapping[str, float] | None) -> list[str]:
    """Sentences for a report: what looks wrong in a summary, by itself and beside the base's."""
    base = baseline or {}
    lines = []
    if (silent := summary.get("silence_rate", 0.0)) > 0:
        lines.append(f"{silent:.0%} of the outputs hold nothing to hear; they count as WER 1, similarity 0, MOS 1")
    stop, base_stop = summary.get("stop_rate"), base.get("stop_rate")
    fallen = stop is not None and base_stop is not None and base_stop - stop >= STOP_RATE_FALL
    if stop is not None and (stop < LEAST_STOP_RATE or fallen):
        beside = "" if base_stop is None else f" (base: {base_stop:.0%})"
        lines.append(
            f"only {stop:.0%} of the outputs end by themselves{beside}, the others run into the length cap: does the "
            "end of speech stand in the targets? is the cap long enough?"
        )
    if _both("wer", summary, base) and summary["wer"] > max(WER_FACTOR * base["wer"], base["wer"] + WER_RISE):
        lines.append(
            f"WER rose from {base['wer']:.1%} to {summary['wer']:.1%}: the words are lost; is the learning rate too "
            "high, do texts and recordings belong together?"
        )
    if _both("sim", summary, base) and base["sim"] - summary["sim"] > SIM_FALL:
        lines.append(
            f"speaker similarity fell from {base['sim']:.3f} to {summary['sim']:.3f}: the voice is lost; do reference "
            "and target come from one speaker, is the reference kept out of the loss?"
        )
    if _both("mos", summary, base) and base["mos"] - summary["mos"] > MOS_FALL:
        lines.append(f"predicted MOS fell from {base['mos']:.2f} to {summary['mos']:.2f}: listen to the outputs")
    length = summary.get("duration_ratio")
    if length is not None and not 1 / DURATION_FACTOR <= length <= DURATION_FACTOR:
        said = "longer" if length > 1 else "shorter"
        lines.append(f"outputs last {length:.2f} times as long as the recordings: much {said} than their texts need")
    return lines


def _both(name: str, summary: Mapping[str, float], base: Mapping[str, float]) -> bool:
    return name in summary and name in base
