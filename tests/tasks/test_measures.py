"""Outputs to rows, rows to a summary, summaries to warnings; no output is dropped."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from speechtune.family import Scorers
from speechtune.tasks.voice_cloning.measures import defect_of, measure, summarise, warnings_of
from speechtune.types import Audio
from voice_cases import RATE, FakeSpeaker, output, row, sample, scorers, tone

pytest.importorskip("jiwer")
pytest.importorskip("whisper_normalizer")

WORDS = {5: "red green dark house", 3: "red clean dark"}


def test_every_figure_of_a_row() -> None:
    rows = measure(
        [sample(0), sample(1)],
        [output(0, tone(0.5)), output(1, tone(0.3, 2.0), stopped=False)],
        [tone(0.5), tone(0.5)],
        [tone(0.1, 0.5), None],
        scorers(WORDS),
    )
    first, second = rows
    assert (first.id, first.speaker, first.language, first.transcript) == ("p0", "s0", "en", "red green dark house")
    assert (first.wer, first.word_errors, first.words) == (0.0, 0, 4)
    assert first.sim == pytest.approx(1.0) and first.mos == pytest.approx(3.0, abs=0.01)
    assert (first.stopped, first.seconds, first.duration_ratio, first.defect) == (True, 1.0, 2.0, None)
    assert (second.wer, second.word_errors, second.words) == (0.5, 2, 4)  # a substitution and a deletion
    assert second.sim == pytest.approx(math.cos(0.2), abs=1e-3)
    assert (second.stopped, second.seconds, second.duration_ratio) == (False, 2.0, None)
    assert summarise(rows) == {
        "wer": 2 / 8,
        "wer_mean": 0.25,
        "sim": pytest.approx((1 + math.cos(0.2)) / 2, abs=1e-3),
        "mos": pytest.approx(2.6, abs=0.01),
        "stop_rate": 0.5,
        "duration_ratio": 2.0,
        "silence_rate": 0.0,
    }


@pytest.mark.parametrize(
    ("audio", "defect", "seconds"),
    [
        (None, "no audio", 0.0),
        (Audio(np.zeros(0, np.float32), RATE), "empty", 0.0),
        (Audio(np.zeros(RATE, np.float32), RATE), "silent", 1.0),
        (Audio(np.full(RATE, np.nan, np.float32), RATE), "not finite", 1.0),
    ],
)
def test_an_output_without_sound_is_the_worst_row_and_says_so(audio: Audio | None, defect: str, seconds: float) -> None:
    rows = measure([sample(0)], [output(0, audio, stopped=False)], [tone(0.5)], [tone(0.5)], scorers(WORDS))
    assert len(rows) == 1
    assert (rows[0].wer, rows[0].word_errors, rows[0].words, rows[0].transcript) == (1.0, 4, 4, "")
    assert (rows[0].sim, rows[0].mos, rows[0].defect, rows[0].seconds) == (0.0, 1.0, defect, seconds)
    assert summarise(rows)["silence_rate"] == 1.0
    assert defect_of(tone(0.5)) is None


def test_a_missing_scorer_leaves_its_figures_out() -> None:
    for audio in (tone(0.5), None):
        rows = measure([sample(0)], [output(0, audio)], [tone(0.5)], [None], Scorers())
        assert (rows[0].wer, rows[0].transcript, rows[0].sim, rows[0].mos) == (None, None, None, None)
        assert set(summarise(rows)) == {"stop_rate", "silence_rate"}
    assert summarise([]) == {}


def test_no_reference_no_similarity() -> None:
    rows = measure([sample(0)], [output(0, tone(0.5))], [None], [None], scorers(WORDS))
    assert rows[0].sim is None and "sim" not in summarise(rows)


def test_a_language_the_recogniser_does_not_know_is_not_measured_and_said() -> None:
    samples = [sample(0), sample(1, language="fr"), sample(2, language=None), sample(3, "...")]
    outputs = [output(n, tone(0.5)) for n in range(4)]
    english = scorers(WORDS, frozenset({"en"}))
    rows = measure(samples, outputs, [None] * 4, [None] * 4, english)
    assert [r.wer for r in rows] == [0.0, None, 0.0, None]
    assert rows[1].note == "no WER: fake asr does not know 'fr'" and "no word" in (rows[3].note or "")
    assert english.asr.asked == 3  # type: ignore[union-attr]
    assert summarise(rows)["wer"] == 0.0


def test_a_voice_is_embedded_once() -> None:
    count, voice = 5, tone(0.4)
    used = scorers(WORDS)
    references = [Audio(voice.samples.copy(), RATE) for _ in range(count)]
    measure(
        [sample(n) for n in range(count)], [output(n, tone(0.5)) for n in range(count)], references, [None] * 5, used
    )
    assert isinstance(used.speaker, FakeSpeaker) and used.speaker.embedded == count + 1


def test_rows_do_not_depend_on_one_another() -> None:
    samples = [sample(n) for n in range(4)]
    outputs = [output(0, tone(0.5)), output(1, None), output(2, tone(0.3)), output(3, tone(0.5, 0.5))]
    references = [tone(0.1 * n + 0.1) for n in range(4)]
    together = measure(samples, outputs, references, references, scorers(WORDS))
    alone = [
        measure([s], [o], [r], [r], scorers(WORDS))[0] for s, o, r in zip(samples, outputs, references, strict=True)
    ]
    assert together == alone


def test_lists_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        measure([sample(0)], [output(1, None)], [None], [None], Scorers())
    with pytest.raises(ValueError, match="do not belong together"):
        measure([sample(0)], [], [None], [None], Scorers())


def test_corpus_wer_weighs_by_words() -> None:
    rows = [row(0, 10), replace(row(1, 0), words=30)]
    assert summarise(rows)["wer"] == 10 / 40 and summarise(rows)["wer_mean"] == 0.5


GOOD = {"wer": 0.05, "sim": 0.8, "mos": 4.0, "stop_rate": 0.9, "duration_ratio": 1.0, "silence_rate": 0.0}


@pytest.mark.parametrize(
    ("change", "baseline", "sentence"),
    [
        ({"stop_rate": 0.3}, None, "does the end of speech stand in the targets"),
        ({"stop_rate": 0.6}, GOOD, "only 60% of the outputs end by themselves (base: 90%)"),
        ({"wer": 0.2}, GOOD, "WER rose from 5.0% to 20.0%"),
        ({"sim": 0.7}, GOOD, "speaker similarity fell from 0.800 to 0.700"),
        ({"mos": 3.0}, GOOD, "predicted MOS fell from 4.00 to 3.00"),
        ({"duration_ratio": 4.0}, None, "much longer"),
        ({"duration_ratio": 0.2}, None, "much shorter"),
        ({"silence_rate": 0.5}, None, "50% of the outputs have no sound"),
    ],
)
def test_a_warning_names_what_went_wrong(
    change: dict[str, float], baseline: dict[str, float] | None, sentence: str
) -> None:
    assert warnings_of(GOOD, baseline) == []
    lines = warnings_of(GOOD | change, baseline)
    assert len(lines) == 1 and sentence in lines[0]


def test_no_warning_about_what_is_not_known() -> None:
    assert warnings_of({}, None) == [] and warnings_of({}, GOOD) == []
    assert warnings_of({"wer": 0.9, "stop_rate": 0.9}, {"stop_rate": 0.9}) == []
    assert warnings_of(GOOD | {"wer": 0.02}, GOOD | {"wer": 0.005}) == []  # twice nearly nothing is nearly nothing
