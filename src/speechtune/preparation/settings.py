"""Every option of `speechtune prepare`, once; docs/prepare.md quotes the measurements behind the thresholds."""

from typing import Literal, Self

from pydantic import Field, model_validator

from speechtune.config import Section

INSTALL = "pip install 'speechtune[prepare]'"


class OutputSettings(Section, frozen=True):
    """The clips that are written."""

    sampling_rate: int = Field(default=24_000, ge=8_000)
    """In Hz; that of the family's codec."""


class ActivitySettings(Section, frozen=True):
    """Where speech is."""

    detector: Literal["silero", "energy"] = "silero"
    """`energy` needs no package, and takes every sound for speech that is louder than the room."""
    threshold: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Probability from which a frame of 32 ms is speech."""
    min_silence_seconds: float = Field(default=0.1, gt=0.0)
    """Shortest pause between two stretches of speech."""


class CutSettings(Section, frozen=True):
    """Where recordings are cut: only in pauses."""

    min_seconds: float = Field(default=2.0, gt=0.0)
    """Shortest clip; a shorter piece of speech is joined to its neighbour, or rejected."""
    max_seconds: float = Field(default=12.0, gt=0.0)
    """Longest clip; a longer piece is cut at its longest pause, or rejected where it has none."""
    pause_seconds: float = Field(default=0.6, gt=0.0)
    """A pause from which on a new clip begins."""
    join_seconds: float = Field(default=0.9, ge=0.0)
    """Longest pause over which a piece that is too short is joined to its neighbour."""
    margin_seconds: float = Field(default=0.1, ge=0.0)
    """Silence left before and after the speech, at most half the pause."""

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.max_seconds < 2 * self.min_seconds:
            raise ValueError("cut.max_seconds must be at least twice cut.min_seconds, or long pieces cannot be cut")
        return self


class TranscribeSettings(Section, frozen=True):
    """What is said."""

    asr: str | None = None
    """Recogniser, such as `faster-whisper:FOLDER_OR_ID` (with confidence, word times and the language)."""
    min_confidence: float = Field(default=0.6, ge=0.0, le=1.0)
    """Least mean probability of a clip's words."""
    max_errors: float = Field(default=0.2, ge=0.0, le=1.0)
    """Largest share of words in which script and recogniser may differ."""


class LoudnessSettings(Section, frozen=True):
    """How loud clips are made."""

    target_lufs: float | None = Field(default=-23.0, le=0.0)
    """Integrated loudness after EBU R 128; null leaves clips as they are."""
    peak_dbfs: float = Field(default=-1.0, le=0.0)
    """Highest true peak; a clip that would exceed it stays quieter."""


class QualitySettings(Section, frozen=True):
    """How good a clip must sound."""

    mos: Literal["distillmos", "dnsmos"] | None = "distillmos"
    """Predictor of the mean opinion score."""
    min_mos: float = Field(default=3.0, ge=1.0, le=5.0)
    """Least predicted score."""
    min_snr_db: float = 25.0
    """Least ratio of speech to the noise of its pauses."""
    max_clipping: float = Field(default=0.0005, ge=0.0, le=1.0)
    """Largest share of samples that stand still at the clip's peak."""
    min_rate: float = Field(default=4.0, ge=0.0)
    """Slowest speech, in characters a second."""
    max_rate: float = Field(default=25.0, gt=0.0)
    """Fastest speech, in characters a second."""


class SpeakerSettings(Section, frozen=True):
    """Whose voice it is."""

    encoder: str | None = "resemblyzer"
    """Speaker encoder: `resemblyzer` or `wavlm:FOLDER_OR_ID`; null takes every clip for one voice."""
    same_voice: float = Field(default=0.72, gt=-1.0, lt=1.0)
    """Mean cosine between the clips of two groups from which on they are one voice."""
    min_similarity: float = Field(default=0.8, ge=-1.0, le=1.0)
    """Least cosine of a clip to the mean of its voice."""
    min_halves: float = Field(default=0.6, ge=-1.0, le=1.0)
    """Least cosine of a clip's halves, from 4 s on; below it two people take turns."""
    voice: str = "voice-1"
    """The voice that is kept; `voice-1` is the one that speaks most."""


class DuplicateSettings(Section, frozen=True):
    """Sentences said more than once."""

    keep: Literal["best", "all"] = "best"
    """Of a sentence said several times the take with the best predicted score, or all of them."""
    alike: float = Field(default=0.9, gt=0.0, le=1.0)
    """Likeness of two texts from which on they are one sentence."""


class SelectSettings(Section, frozen=True):
    """What clips are for."""

    held_out: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the sentences that is set aside for evaluation, at least one."""
    reference_min_seconds: float = Field(default=3.0, gt=0.0)
    """Shortest reference."""
    reference_max_seconds: float = Field(default=8.0, gt=0.0)
    """Longest reference."""
    seed: int = 42
    """Chooses the sentences that are held out."""


class VerdictSettings(Section, frozen=True):
    """What GO takes: conventions, for no run has measured what amount gives what voice."""

    min_minutes: float = Field(default=3.0, ge=0.0)
    """Least minutes of clips for training."""
    min_clips: int = Field(default=20, ge=1)
    """Least number of clips for training."""
    max_second_voice: float = Field(default=0.25, ge=0.0, le=1.0)
    """Largest share of the speech that another voice may have before the choice of the voice is asked for."""


class PrepareConfig(Section, frozen=True):
    """How recordings become data."""

    output: OutputSettings = OutputSettings()
    activity: ActivitySettings = ActivitySettings()
    cut: CutSettings = CutSettings()
    transcribe: TranscribeSettings = TranscribeSettings()
    loudness: LoudnessSettings = LoudnessSettings()
    quality: QualitySettings = QualitySettings()
    speakers: SpeakerSettings = SpeakerSettings()
    duplicates: DuplicateSettings = DuplicateSettings()
    select: SelectSettings = SelectSettings()
    verdict: VerdictSettings = VerdictSettings()
