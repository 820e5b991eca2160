"""What is asked of a preparation, and what came out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechtune.family import MosPredictor, Scorers, SpeakerEncoder, Transcriber
from speechtune.preparation.activity import Activity, Detector
from speechtune.preparation.cut import Piece
from speechtune.preparation.decide import Findings, Reason
from speechtune.preparation.recordings import Recording
from speechtune.preparation.results import digest
from speechtune.preparation.selection import KeptClip
from speechtune.preparation.settings import PrepareConfig
from speechtune.preparation.transcribe import Language

STEPS, CLIPS = ".steps", "clips"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: recordings, where to, how, by whom it is heard, and what is known of them."""

    recordings: Path
    out: Path
    config: PrepareConfig
    asr: Transcriber
    detector: Detector
    speaker_encoder: SpeakerEncoder | None = None
    mos: MosPredictor | None = None
    script: Sequence[str] = ()
    language: str | None = None
    speaker: str | None = None

    @property
    def made_with(self) -> dict[str, object]:
        """The settings that the sound of pieces depends on."""
        config = self.config
        return {"sampling_rate": config.output.sampling_rate, "loudness": config.loudness.model_dump()}

    def piece_file(self, piece: Piece) -> Path:
        """Where a piece lies, kept or not."""
        return self.out / STEPS / f"pieces-{digest(self.made_with)}" / f"{piece.key}.flac"

    @property
    def scorer_names(self) -> dict[str, str]:
        """What measured what."""
        return Scorers(self.asr, self.speaker_encoder, self.mos).names | {"activity": self.detector.name}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What came out: all that was found, the reasons against each piece, and the clips that are kept."""

    request: Request
    recordings: Sequence[Recording]
    activities: Mapping[str, Activity]
    findings: Findings
    languages: Mapping[str, Language]
    reasons: Mapping[str, list[Reason]]
    clips: Sequence[KeptClip]
    held: set[str]
