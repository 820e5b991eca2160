"""The shipped base speaks, an adaptation is heard, and each planted fault of training is heard too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soxr

from sound_cases import Heard, hear, lines, recording, speak, voice_audio
from speechtune.audio import read_audio
from speechtune.cli import main
from speechtune.config import RunConfig
from speechtune.families.higgs_audio_v2 import codec_world, layout
from speechtune.families.layers.ops import IGNORE
from speechtune.family import Scorers
from speechtune.tasks.voice_cloning.word_errors import word_errors
from speechtune.types import AudioRef, Sample

VOICES_HEARD = ("af_heart", "af_sarah", "am_adam", "af_nicole", "bf_emma", "am_puck")
README_TEXT = "Please hold while we try to connect you."
LEAST_STOPPED, MOST_WER, LEAST_SIMILAR = 0.9, 0.6, 0.65


def no_eos(patch: pytest.MonkeyPatch) -> None:
    """EOS is no target."""
    right = layout.row_labels

    def wrong(rows_RK: np.ndarray, num_frames: int) -> np.ndarray:
        labels_RK = right(rows_RK, num_frames)
        for k in range(labels_RK.shape[1]):
            labels_RK[k + num_frames + 1, k] = IGNORE
        return labels_RK

    patch.setattr(layout, "row_labels", wrong)


def no_delay(patch: pytest.MonkeyPatch) -> None:
    """All codebooks of a frame in one row."""

    def wrong(codes_FK: np.ndarray, bos: int, eos: int) -> np.ndarray:
        num_frames, num_codebooks = codes_FK.shape
        rows_RK = np.full((num_frames + num_codebooks + 1, num_codebooks), eos, dtype=np.int64)
        rows_RK[0], rows_RK[1 : num_frames + 1] = bos, codes_FK
        return rows_RK

    patch.setattr(layout, "delay_rows", wrong)


def no_shift(patch: pytest.MonkeyPatch) -> None:
    """Each row is predicted from itself."""
    right = layout.target_arrays

    def wrong(*args: object) -> dict[str, np.ndarray]:
        arrays = right(*args)  # type: ignore[arg-type]
        return arrays | {"audio_positions": arrays["audio_positions"] + 1}

    patch.setattr(layout, "target_arrays", wrong)


def wrong_rate(patch: pytest.MonkeyPatch) -> None:
    """Recordings at 16 kHz are taken for recordings at 24 kHz."""
    right = codec_world.analyse
    patch.setattr(codec_world, "analyse", lambda samples: right(soxr.resample(samples, 24_000, 16_000)))


FAULTS = {no_eos: "stop_rate", no_delay: "wer", no_shift: "wer", wrong_rate: "similarity"}


def complaints(heard: Heard) -> list[str]:
    """Which of the three figures are out of bounds."""
    bad = {
        "stop_rate": heard.stop_rate < LEAST_STOPPED,
        "wer": heard.wer > MOST_WER,
        "similarity": heard.similarity < LEAST_SIMILAR,
    }
    return [name for name, is_bad in bad.items() if is_bad]


def test_the_base_speaks(config: RunConfig, ears: Scorers) -> None:
    """Forty sentences that no clip of its training says, each behind a recording of one of six voices."""
    clips = [recording(VOICES_HEARD[index % len(VOICES_HEARD)]) for index in range(40)]
    texts = lines("sentences.txt")
    samples = [Sample(str(i), text, None, (clip,)) for i, (text, clip) in enumerate(zip(texts, clips, strict=True))]
    heard = hear(speak(config, None, samples), samples, [voice_audio(clip) for clip in clips], ears)
    print(heard)
    assert not complaints(heard), heard


def test_generate_speaks_where_no_model_is_named(tmp_path: Path, ears: Scorers) -> None:
    """The README's first example."""
    out = tmp_path / "hello.wav"
    assert (
        main(["generate", "--text", README_TEXT, "--out", str(out), "--cache-dir", str(tmp_path), "--seed", "0"]) == 0
    )
    assert ears.asr is not None
    (heard,) = ears.asr.transcribe([read_audio(AudioRef(str(out)))], ["en"])
    errors, words = word_errors(README_TEXT, heard, "en")
    assert errors <= words / 2, heard


def test_a_new_voice_is_learnt(adapted: Callable[..., Heard]) -> None:
    heard = adapted("right")
    print(heard)
    assert not complaints(heard), heard


def test_an_adapter_that_is_not_loaded_is_heard(adapted: Callable[..., Heard]) -> None:
    heard = adapted("base", trained=False)
    print(heard)
    assert "similarity" in complaints(heard), heard


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_of_training_is_heard(plant: Callable, adapted: Callable[..., Heard], monkeypatch) -> None:
    plant(monkeypatch)
    heard = adapted(plant.__name__)
    print(plant.__name__, heard)
    assert FAULTS[plant] in complaints(heard), heard
