"""Which pieces are kept, and why the others are not: thresholds against what the steps found."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from speechtune.data.text_checks import speech_rate
from speechtune.preparation.cut import Piece
from speechtune.preparation.duplicates import find_duplicates
from speechtune.preparation.loudness import Loudness
from speechtune.preparation.quality import Quality
from speechtune.preparation.script import Aligned, Match
from speechtune.preparation.settings import PrepareConfig
from speechtune.preparation.speakers import Voice
from speechtune.preparation.transcribe import Transcript


@dataclass(slots=True)
class Findings:
    """What the steps found, by the pieces' keys; what a step left out is not there."""

    pieces: Mapping[str, Piece]
    loudness: Mapping[str, Loudness] = field(default_factory=dict)
    quality: Mapping[str, Quality] = field(default_factory=dict)
    voices: Mapping[str, Voice] = field(default_factory=dict)
    transcripts: Mapping[str, Transcript] = field(default_factory=dict)
    languages: Mapping[str, str | None] = field(default_factory=dict)
    script: Aligned | None = None

    def match(self, key: str) -> Match | None:
        """The script's text of a piece."""
        return self.script.matches.get(key) if self.script else None

    def text(self, key: str) -> str:
        """The text of a piece: the script's, where there is a script."""
        match = self.match(key)
        return match.text if match else self.transcripts[key].text


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a piece is rejected: a short code for tables, and a sentence."""

    code: str
    message: str


def reject_by_length(piece: Piece, config: PrepareConfig) -> Reason | None:
    """A piece that is too short or too long to be looked at further."""
    if piece.seconds < config.cut.min_seconds:
        return Reason("too_short", f"{piece.seconds:.2f} s of speech with no other near enough to be joined to")
    if piece.seconds > config.cut.max_seconds:
        return Reason("too_long", f"{piece.seconds:.2f} s of speech without a pause to cut at")
    return None


def is_voice(findings: Findings, key: str, config: PrepareConfig) -> bool:
    """Whether a piece is of the voice that is kept, as far as voices were told apart."""
    return key not in findings.voices or findings.voices[key].name == config.speakers.voice


def decide(findings: Findings, config: PrepareConfig) -> dict[str, list[Reason]]:
    """The reasons against each piece, the gravest first; empty for what is kept."""
    reasons = {key: list(_reasons(key, findings, config)) for key in findings.pieces}
    if config.duplicates.keep == "best":
        left = [key for key, against in reasons.items() if not against]
        texts = {key: findings.text(key) for key in left}
        quality = {key: sounds(findings.quality[key]) for key in left}
        for key, kept in find_duplicates(texts, quality, config.duplicates.alike).items():
            stays = findings.pieces[kept]
            reasons[key].append(Reason("duplicate", f"says the same as {stays.id}, which sounds better"))
    return reasons


def sounds(quality: Quality) -> float:
    """What takes of a sentence, and references, are ranked by: the predicted score, or without one the noise."""
    return quality.snr_db if quality.mos is None else quality.mos


def _reasons(key: str, findings: Findings, config: PrepareConfig) -> Iterator[Reason]:
    if reason := reject_by_length(findings.pieces[key], config):
        yield reason
        return
    quality, limits = findings.quality[key], config.quality
    if quality.sound:
        yield Reason(quality.sound, f"a {quality.sound}, no speech")
    if (voice := findings.voices.get(key)) is not None:
        if not is_voice(findings, key, config):
            yield Reason("other_voice", f"{voice.name} speaks, not {config.speakers.voice}")
        elif voice.similarity < config.speakers.min_similarity:
            what = f"cosine {voice.similarity:.2f} to its mean, below {config.speakers.min_similarity:g}"
            yield Reason("other_voice", f"unlike {voice.name}: {what}")
        elif voice.halves is not None and voice.halves < config.speakers.min_halves:
            what = f"cosine {voice.halves:.2f} of its halves, below {config.speakers.min_halves:g}"
            yield Reason("two_voices", f"more than one voice: {what}")
    clipping = findings.loudness[key].clipping
    if clipping > limits.max_clipping:
        yield Reason("clipped", f"{clipping:.2%} of the samples stand still at the peak")
    if quality.snr_db < limits.min_snr_db:
        yield Reason("noisy", f"speech only {quality.snr_db:.1f} dB above noise, below {limits.min_snr_db:g} dB")
    if quality.mos is not None and quality.mos < limits.min_mos:
        yield Reason("low_mos", f"predicted opinion score {quality.mos:.2f}, below {limits.min_mos:g}")
    if key in findings.transcripts:
        yield from _text_reasons(key, findings, config)


def _text_reasons(key: str, findings: Findings, config: PrepareConfig) -> Iterator[Reason]:
    """What speaks against the words of a piece."""
    transcript, match = findings.transcripts[key], findings.match(key)
    settings, limits = config.transcribe, config.quality
    if not any(map(str.isalnum, transcript.text)):
        yield Reason("no_words", "the recogniser finds no words")
        return
    if findings.script and match is None:
        yield Reason("script_mismatch", f"no part of the script is like {transcript.text!r}")
    elif match and match.errors > settings.max_errors:
        where = ", ".join(str(line + 1) for line in match.lines)
        what = f"{match.errors:.0%} of the words of {match.text!r} (line {where}) differ from {transcript.text!r}"
        yield Reason("script_mismatch", what)
    elif match is None and transcript.confidence is not None and transcript.confidence < settings.min_confidence:
        least = settings.min_confidence
        yield Reason(
            "low_confidence", f"the recogniser is sure of its words to {transcript.confidence:.2f}, below {least:g}"
        )
    rate = speech_rate(findings.text(key), findings.pieces[key].speech_seconds)
    if not limits.min_rate <= rate <= limits.max_rate:
        yield Reason(
            "speech_rate", f"{rate:.1f} characters a second; {limits.min_rate:g} to {limits.max_rate:g} are usual"
        )
