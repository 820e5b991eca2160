"""Speechocean762 folders: labels, every issue with its message, held-out speakers, and the verb validate on them."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from rich.console import Console

from speechtune.commands.validate import print_report, run_validate, validate
from speechtune.config import DataConfig
from speechtune.data.audio_checks import check_audio
from speechtune.data.row_parser import ReadResult
from speechtune.data.speechocean import is_speechocean, read_speechocean
from speechtune.data.splits import split_speakers
from speechtune.errors import Issue, ManifestError
from speechtune.tasks.pronunciation.phones import PHONES, realised_phones
from speechtune.tasks.pronunciation.targets import MAX_CLIP_SECONDS
from speechtune.types import Mispronunciation, Pronunciation, Sample, Word

MINI = Path(__file__).parents[3] / "shared" / "data" / "speechocean762-mini"
mini = pytest.mark.skipif(not MINI.is_dir(), reason=f"no real data: {MINI} is absent")

LISA = {
    "text": "LISA",
    "accuracy": 5,
    "stress": 10,
    "total": 6,
    "phones": ["L", "IY1", "S", "AH0"],
    "phones-accuracy": [0.4, 2, 2, 1.2],
    "mispronunciations": [{"canonical-phone": "L", "index": 0, "pronounced-phone": "D Z"}],
}
HI = {"text": "HI", "phones": "HH AY1", "phones-accuracy": [2.0, 1.5], "accuracy": 10, "stress": 10, "total": 10}
SCORES = {"accuracy": 8, "completeness": 10.0, "fluency": 9, "prosodic": 7.5, "total": 8}


class Corpus:
    """A corpus of three training utterances of two speakers and one test utterance, to be spoilt and written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tables: dict[str, dict[str, list[str]]] = {}
        self.scores: dict[str, Any] = {}
        for split, people in (("train", {"01": ("u1", "u2"), "02": ("u3",)}), ("test", {"09": ("t1",)})):
            ids = [(speaker, utterance) for speaker, own in people.items() for utterance in own]
            self.tables[split] = {
                "text": [f"{utterance}\tHI LISA" for _, utterance in ids],
                "wav.scp": [f"{utterance}\tWAVE/SPEAKER{speaker}/{utterance}.WAV" for speaker, utterance in ids],
                "utt2spk": [f"{utterance}\t{speaker}" for speaker, utterance in ids],
                "spk2age": [f"{speaker}\t{int(speaker) + 5}" for speaker in people],
                "spk2gender": [f"{speaker}\tf" for speaker in people],
            }
            for speaker, utterance in ids:
                entry = {"text": "HI LISA", **SCORES, "words": [copy.deepcopy(HI), copy.deepcopy(LISA)]}
                self.scores[utterance] = entry
                self.sound(f"WAVE/SPEAKER{speaker}/{utterance}.WAV")

    def sound(self, name: str, seconds: float = 0.2) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).normal(0, 0.1, round(seconds * 4000)).astype(np.float32)
        soundfile.write(path, noise, 4000, format="WAV")

    def write(self, scores: str | None = None) -> Path:
        for split, tables in self.tables.items():
            (self.folder / split).mkdir(exist_ok=True)
            for name, lines in tables.items():
                text = "".join(f"{line}\n" for line in lines)
                (self.folder / split / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        (self.folder / "resource").mkdir(exist_ok=True)
        (self.folder / "resource" / "scores.json").write_text(scores or json.dumps(self.scores, indent=1))
        return self.folder

    def read(self, **options: Any) -> ReadResult:
        """Read the training split and the headers of its clips."""
        config = DataConfig(**options)
        result = read_speechocean(self.write(), "train", config)
        found = check_audio(result.samples, config, max_seconds=MAX_CLIP_SECONDS).issues
        bad = {issue.row for issue in found}
        samples = [sample for sample in result.samples if sample.row not in bad]
        return replace(result, samples=samples, issues=result.issues + found)

    @property
    def lisa(self) -> dict[str, Any]:
        return self.scores["u2"]["words"][1]

    def mispronounced(self, **fields: Any) -> None:
        entry = {"canonical-phone": "L", "index": 0, "pronounced-phone": "D"}
        self.lisa["mispronunciations"] = [entry | {key.replace("_", "-"): value for key, value in fields.items()}]


def labels_of(sample: Sample) -> Pronunciation:
    assert sample.pronunciation is not None
    return sample.pronunciation


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def test_a_sound_corpus(corpus: Corpus) -> None:
    result = corpus.read()
    assert (result.issues, result.notes, result.num_rows) == ([], [], 3)
    first = result.samples[0]
    assert [sample.id for sample in result.samples] == ["u1", "u2", "u3"]
    assert (first.text, first.speaker, first.language) == ("HI LISA", "01", "en")
    assert first.source == f"{corpus.folder / 'train' / 'text'}:1"
    assert result.samples[2].source.endswith("text:3")
    assert first.audio is not None
    assert first.audio.path == str((corpus.folder / "WAVE/SPEAKER01/u1.WAV").resolve())
    labels = labels_of(first)
    assert (labels.age, labels.gender, labels.task, labels.target, labels.raters) == (6, "f", None, None, {})
    assert labels.scores == SCORES
    hi, lisa = labels.words
    assert hi == Word("HI", ("HH", "AY"), (2.0, 1.5), (), {"accuracy": 10, "stress": 10, "total": 10})
    assert lisa.phones == ("L", "IY", "S", "AH")
    assert lisa.mispronunciations == (Mispronunciation(0, "L", "D Z"),)
    assert json.dumps(asdict(labels))  # what a fingerprint is made of


def test_the_test_split(corpus: Corpus) -> None:
    result = read_speechocean(corpus.write(), "test", DataConfig())
    assert [(sample.id, sample.speaker) for sample in result.samples] == [("t1", "09")]


@pytest.mark.parametrize("separator", [" ", "   ", "\t", " \t "])
def test_tabs_and_blanks(corpus: Corpus, separator: str) -> None:
    for tables in corpus.tables.values():
        for lines in tables.values():
            lines[:] = [line.replace("\t", separator) for line in lines] + [""]
    assert [sample.text for sample in corpus.read().samples] == ["HI LISA"] * 3
    assert corpus.read().issues == []


def test_paths_relative_to_the_current_folder(
    corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (corpus.folder / "WAVE").rename(elsewhere / "WAVE")
    assert [issue.code for issue in corpus.read().issues] == ["missing_file"] * 3
    monkeypatch.chdir(elsewhere)
    result = corpus.read()
    assert result.issues == []
    assert result.samples[0].audio is not None
    assert result.samples[0].audio.path == str((elsewhere / "WAVE/SPEAKER01/u1.WAV").resolve())
    # confined to the dataset's folder, the clip elsewhere does not count
    assert [issue.code for issue in corpus.read(audio_root=corpus.folder).issues] == ["missing_file"] * 3


def test_optional_fields_are_notes_with_counts(corpus: Corpus) -> None:
    for utterance in ("u1", "u2"):
        del corpus.scores[utterance]["completeness"]
        del corpus.scores[utterance]["words"][0]["stress"]
    corpus.lisa["phones-accuracy"][1:3] = [0.4, 0]
    corpus.tables["train"]["spk2age"].pop()
    del corpus.tables["train"]["spk2gender"]
    result = corpus.read()
    assert result.issues == []
    assert set(result.notes) == {
        "train: utterances without 'completeness' (2)",
        "train: words without 'stress' (2)",
        "train: phones below 0.5 without mispronunciation, taken as canonical (2)",
        "train: speakers without age (1)",
        "train/spk2gender is missing: known of no speaker (1)",
    }
    assert "completeness" not in labels_of(result.samples[0]).scores
    assert labels_of(result.samples[0]).gender is None and labels_of(result.samples[2]).age is None


FIVE = {"accuracy": [7, 9, 8, 8, 9], "fluency": [10, 9, 8, 8, 10], "prosodic": [10, 9, 7, 8, 9]}
FIVE |= {"total": [7.6, 9, 7.9, 8, 9.1], "completeness": [1.0] * 5}


def detailed(corpus: Corpus, **entries: Any) -> ReadResult:
    """Read the training split with `entries` as scores-detail.json."""
    (corpus.write() / "resource" / "scores-detail.json").write_text(json.dumps(entries))
    return corpus.read()


def raters(result: ReadResult) -> list[Mapping[str, Sequence[float]]]:
    return [labels_of(sample).raters for sample in result.samples]


def test_scores_of_single_raters(corpus: Corpus) -> None:
    assert raters(corpus.read()) == [{}] * 3  # and no note: copies lack the file
    entry = {**FIVE, "text": "hi  lisa", "words": []}
    result = detailed(corpus, u1=entry, u2=FIVE, u3=entry, t1=entry)
    assert (result.issues, result.notes) == ([], [])
    wanted = {name: FIVE[name] for name in ("accuracy", "fluency", "prosodic", "total")}
    assert raters(result) == [wanted] * 3
    assert raters(read_speechocean(corpus.folder, "test", DataConfig())) == [wanted]


@pytest.mark.parametrize(
    "values", [None, [], 8, "8", [8, None, 8], [8, "8"], [8, True], [8, 11], [-1, 8], [8, math.nan], {"a": 8}]
)
def test_damaged_scores_of_single_raters_are_left_out(corpus: Corpus, values: Any) -> None:
    result = detailed(corpus, u1={**FIVE, "fluency": values}, u2=FIVE, u3={**FIVE, "text": "HI LIZ"})
    assert result.issues == []
    first, second, third = raters(result)
    assert list(first) == ["accuracy", "prosodic", "total"] and len(second) == 4 and third == {}
    assert set(result.notes) == {
        "train: utterances without valid 'fluency' scores of single raters (1)",
        "train: utterances whose single raters scored another text (1)",
    }


def test_missing_entries_of_single_raters_are_noted(corpus: Corpus) -> None:
    result = detailed(corpus, u1=FIVE, u2=[1, 2])
    assert list(map(bool, raters(result))) == [True, False, False]
    assert result.notes == ["train: utterances without scores of single raters (2)"]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object with the utterance ids as keys"),
        ('{"u1": {"total": [1, 2], "total": [3, 4]}}', "holds the key 'total' twice"),
    ],
)
def test_a_damaged_file_of_single_raters_is_noted(corpus: Corpus, text: str, note: str) -> None:
    (corpus.write() / "resource" / "scores-detail.json").write_text(text)
    result = corpus.read()
    assert (raters(result), result.issues) == ([{}] * 3, [])
    (found,) = result.notes
    assert found.startswith("no scores of single raters: ") and note in found and found.endswith("(1)")


def test_an_utterance_that_stands_twice_has_no_single_raters(corpus: Corpus) -> None:
    entry = json.dumps(FIVE)
    text = f'{{"u1": {entry}, "u2": {entry}, "u2": {entry}, "u3": {entry}}}'
    (corpus.write() / "resource" / "scores-detail.json").write_text(text)
    assert list(map(bool, raters(corpus.read()))) == [True, False, True]


def edit(path: str, value: Any) -> Callable[[Corpus], None]:
    """Set a field of u2's entry in scores.json, such as "words.1.phones"; `...` removes it."""

    def spoil(corpus: Corpus) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        node = corpus.scores["u2"]
        for part in way:
            node = node[part]
        if value is ...:
            del node[last]
        else:
            node[last] = value

    return spoil


def line(name: str, *lines: str | None) -> Callable[[Corpus], None]:
    """Replace line 2 of a training table."""

    def spoil(corpus: Corpus) -> None:
        corpus.tables["train"][name][1:2] = [text for text in lines if text is not None]

    return spoil


def said(**fields: Any) -> Callable[[Corpus], None]:
    return lambda corpus: corpus.mispronounced(**fields)


ENTRY = {"canonical-phone": "L", "index": 0, "pronounced-phone": "D"}
ISSUES: list[tuple[Callable[[Corpus], None], str, str, str]] = [
    (lambda c: c.scores.pop("u2"), "missing_scores", "resource/scores.json:1", "no object for this utterance"),
    (edit("fluency", ...), "missing_score", "scores.json:", "'fluency' is missing"),
    (edit("total", None), "missing_score", "scores.json:", "'total' is missing"),
    (edit("accuracy", "8"), "bad_score", "scores.json:", "'accuracy' is not a number but '8'"),
    (edit("accuracy", True), "bad_score", "scores.json:", "'accuracy' is not a number but True"),
    (edit("prosodic", 10.5), "bad_score", "scores.json:", "'prosodic' is 10.5, outside 0 to 10"),
    (edit("prosodic", -1), "bad_score", "scores.json:", "'prosodic' is -1, outside 0 to 10"),
    (edit("total", math.nan), "bad_score", "scores.json:", "'total' is nan, outside 0 to 10"),
    (edit("total", 10**400), "bad_score", "scores.json:", "outside 0 to 10"),
    (edit("completeness", 11), "bad_score", "scores.json:", "'completeness' is 11, outside 0 to 10"),
    (edit("words.1.stress", 12), "bad_score", "scores.json:", "word 2 (LISA): 'stress' is 12, outside 0 to 10"),
    (edit("words", ...), "missing_words", "scores.json:", "gives no list of words"),
    (edit("words", []), "missing_words", "scores.json:", "gives no list of words"),
    (edit("words.0", "HI"), "missing_words", "scores.json:", "word 1 is not an object but 'HI'"),
    (edit("words.0.text", " "), "missing_words", "scores.json:", "word 1 has no text"),
    (edit("words.1.phones", ...), "bad_field", "scores.json:", "word 2 (LISA): 'phones' is neither a list of texts"),
    (edit("words.1.phones", []), "missing_phones", "scores.json:", "word 2 (LISA): 'phones' is empty"),
    (edit("words.1.phones.2", "Q"), "unknown_phone", "scores.json:", "word 2 (LISA): 'Q' is none of the 39"),
    (edit("words.1.phones-accuracy", ...), "missing_score", "scores.json:", "no list 'phones-accuracy'"),
    (edit("words.1.phones-accuracy", [0.4, 2]), "count_mismatch", "scores.json:", "4 phone(s), but 2 value(s)"),
    (edit("words.1.phones-accuracy.3", 2.1), "bad_score", ":", "'phones-accuracy[3]' is 2.1, outside 0 to 2"),
    (edit("words.1.phones-accuracy.3", None), "missing_score", ":", "'phones-accuracy[3]' is missing"),
    (edit("words.1.mispronunciations", ...), "missing_mispronunciations", ":", "a phone is scored below 0.5"),
    (edit("words.1.mispronunciations", "D"), "missing_mispronunciations", ":", "no list 'mispronunciations'"),
    (edit("words.1.mispronunciations", [ENTRY, ENTRY]), "duplicate_index", ":", "for the phone at index 0"),
    (said(index=4), "bad_index", "scores.json:", "word 2 (LISA): 'index' 4 lies outside the word, which has 4"),
    (said(index=-1), "bad_index", "scores.json:", "'index' -1 lies outside the word"),
    (said(index=1), "phone_mismatch", "scores.json:", "'L' is not the phone at index 1, which is 'IY'"),
    (said(pronounced_phone="Q"), "unknown_phone", "scores.json:", "word 2 (LISA): 'Q' is none of the 39"),
    (said(pronounced_phone=None), "bad_field", "scores.json:", "'pronounced-phone' of a mispronunciation"),
    (edit("text", "HI LIZ"), "text_mismatch", "scores.json:", "differs from 'text' in scores.json, 'HI LIZ'"),
    (edit("words.1.text", "LIZ"), "text_mismatch", "scores.json:", "'HI LISA' differs from the words"),
    (line("text", "u2\tHI"), "text_mismatch", "scores.json:", "'HI' differs from 'text' in scores.json, 'HI LISA'"),
    (line("text", "u2\tHI<|eot|> LISA"), "special_token", "train/text:2", "'<|eot|>'"),
    (line("text"), "missing_text", "train/wav.scp:2", "train/text has no valid line for it"),
    (line("wav.scp"), "missing_audio", "train/text:2", "train/wav.scp has no valid line for it"),
    (line("utt2spk"), "missing_speaker", "train/text:2", "train/utt2spk has no valid line for it"),
    (line("wav.scp", "u2\tgone.WAV"), "missing_file", "train/text:2", "no such file"),
    (line("wav.scp", "u2\tsox u2.WAV -t wav - |"), "bad_path", "train/wav.scp:2", "commands are not run"),
    (line("wav.scp", "u2\thttps://x.org/u2.WAV"), "url_refused", "train/wav.scp:2", "URLs are refused"),
]


@pytest.mark.parametrize(("spoil", "code", "place", "message"), ISSUES, ids=[row[3] for row in ISSUES])
def test_issues(corpus: Corpus, spoil: Callable[[Corpus], None], code: str, place: str, message: str) -> None:
    spoil(corpus)
    result = corpus.read()
    assert [issue.code for issue in result.issues] == [code], list(map(str, result.issues))
    issue = result.issues[0]
    assert issue.sample_id == "u2"
    assert place in issue.source
    assert message in issue.message
    assert [sample.id for sample in result.samples] == ["u1", "u3"]


def test_the_line_in_scores_json(corpus: Corpus) -> None:
    edit("total", 11)(corpus)
    (issue,) = corpus.read().issues
    number = int(issue.source.rpartition(":")[2])
    text = (corpus.folder / "resource" / "scores.json").read_text().split("\n")[number - 1]
    assert text.strip().startswith('"u2"')


FILE_ISSUES: list[tuple[Callable[[Corpus], None], str, str, str]] = [
    (line("text", "u2\tHI LISA", "u2\tHI LISA"), "duplicate_id", "train/text:3", "already stands in line 2"),
    (line("wav.scp", "u2\ta.WAV", "u2\tb.WAV"), "duplicate_id", "train/wav.scp:3", "already stands in line 2"),
    (line("text", "u2"), "bad_line", "train/text:2", "a line is an id, a tab or blank, and a value"),
    (line("text", "u2\tHI \udcff"), "bad_unicode", "train/text:2", "bytes that are not UTF-8"),
    (line("utt2spk", "u2\t0\0"), "bad_unicode", "train/utt2spk:2", "bytes that are not UTF-8, or NUL"),
]


@pytest.mark.parametrize(("spoil", "code", "place", "message"), FILE_ISSUES, ids=[row[2] for row in FILE_ISSUES])
def test_issues_of_lines(corpus: Corpus, spoil: Callable[[Corpus], None], code: str, place: str, message: str) -> None:
    spoil(corpus)
    result = corpus.read()
    issue = result.issues[0]
    assert (issue.code, issue.sample_id) == (code, "u2")
    assert place in issue.source
    assert message in issue.message
    assert [sample.id for sample in result.samples] == ["u1", "u3"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("spk2age", "old", "age 'old' is not a number of years"),
        ("spk2age", "1000", "age '1000' is not a number of years"),
        ("spk2gender", "x", "gender 'x' is not m or f"),
    ],
)
def test_issues_of_speakers(corpus: Corpus, name: str, value: str, message: str) -> None:
    corpus.tables["train"][name][1] = f"02\t{value}"
    (issue,) = corpus.read().issues
    assert (issue.code, issue.message) == ("bad_field", f"speaker 02: {message}")
    assert issue.source.endswith(f"train/{name}:2")


@pytest.mark.parametrize("name", ["text", "wav.scp", "utt2spk"])
def test_missing_tables(corpus: Corpus, name: str) -> None:
    del corpus.tables["train"][name]
    result = corpus.read()
    assert (result.issues[0].code, result.issues[0].message) == (
        "missing_table",
        "no such file; every split needs it",
    )
    assert len(result.issues) == 4  # and each utterance by name
    assert result.samples == []


def test_an_empty_split(corpus: Corpus) -> None:
    for lines in corpus.tables["train"].values():
        lines.clear()
    assert [(issue.code, issue.message) for issue in corpus.read().issues] == [("empty_manifest", "holds no rows")]


def test_every_issue_of_an_utterance_is_listed(corpus: Corpus) -> None:
    edit("total", 11)(corpus)
    edit("words.0.phones-accuracy", [3, -1])(corpus)
    edit("words.1.phones.0", "Q")(corpus)
    line("wav.scp")(corpus)
    corpus.scores["u3"]["fluency"] = None
    found = [(issue.sample_id, issue.code) for issue in corpus.read().issues]
    expected = [("u2", code) for code in ("missing_audio", "bad_score", "bad_score", "bad_score", "unknown_phone")]
    assert found == [*expected, ("u3", "missing_score")]


def test_outside_the_root(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (corpus.folder / "WAVE/SPEAKER01/u2.WAV").rename(outside / "u2.WAV")
    (corpus.folder / "WAVE/SPEAKER01/u2.WAV").symlink_to(outside / "u2.WAV")
    line("wav.scp", f"u2\t../{outside.name}/u2.WAV")(corpus)
    assert corpus.read().issues == []
    for place in (f"../{outside.name}/u2.WAV", "WAVE/SPEAKER01/u2.WAV", str(outside / "u2.WAV")):
        corpus.tables["train"]["wav.scp"][1] = f"u2\t{place}"
        (issue,) = corpus.read(audio_root=corpus.folder).issues
        assert (issue.code, issue.sample_id) == ("outside_root", "u2")
        assert "outside data.audio_root" in issue.message


def test_clips_over_the_limit(corpus: Corpus) -> None:
    corpus.sound("WAVE/SPEAKER01/u1.WAV", MAX_CLIP_SECONDS)
    corpus.sound("WAVE/SPEAKER01/u2.WAV", MAX_CLIP_SECONDS + 0.1)
    corpus.sound("WAVE/SPEAKER02/u3.WAV", 61)
    result = corpus.read()
    assert [(issue.sample_id, issue.code) for issue in result.issues] == [("u2", "too_long"), ("u3", "too_long")]
    assert "40.1 s is longer than 40 s; cut it" in result.issues[0].message
    assert [sample.id for sample in result.samples] == ["u1"]
    unopened = read_speechocean(corpus.folder, "train", DataConfig())
    assert (len(unopened.samples), unopened.issues) == (3, [])


def test_duplicate_keys_in_scores_json(corpus: Corpus) -> None:
    entry = json.dumps(corpus.scores["u2"])
    others = f'"u1": {json.dumps(corpus.scores["u1"])}, "u3": {json.dumps(corpus.scores["u3"])}'
    folder = corpus.write(f'{{"u2": {entry},\n"u2": {entry},\n{others}}}')
    (issue,) = read_speechocean(folder, "train", DataConfig()).issues
    assert (issue.sample_id, issue.code) == ("u2", "duplicate_id")
    assert issue.message == "scores.json holds this utterance twice"
    folder = corpus.write(
        f'{{"u2": {entry.replace("{", chr(123) + chr(34) + "total" + chr(34) + ": 3, ", 1)},\n{others}}}'
    )
    (issue,) = read_speechocean(folder, "train", DataConfig()).issues
    assert (issue.code, issue.message) == ("duplicate_key", "an object holds the key 'total' twice")


@pytest.mark.parametrize(
    ("scores", "message"),
    [("{", "not valid JSON"), ("[1]", "expected an object with the utterance ids as keys, found list")],
)
def test_scores_that_cannot_be_read(corpus: Corpus, scores: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_speechocean(corpus.write(scores), "train", DataConfig())


def test_another_folder(tmp_path: Path) -> None:
    assert not is_speechocean(tmp_path)
    with pytest.raises(ManifestError, match=r"cannot be read: No such file.*is this the folder of Speechocean762"):
        read_speechocean(tmp_path, "train", DataConfig())


def people(count: int, each: int = 3) -> list[Sample]:
    return [Sample(f"{n}-{k}", "x", None, speaker=str(n)) for k in range(each) for n in range(count)]


@pytest.mark.parametrize(("fraction", "held"), [(0.001, 1), (0.1, 1), (0.25, 2), (0.5, 5), (0.99, 9)])
def test_whole_speakers_are_held_out(fraction: float, held: int) -> None:
    samples = people(10)
    train, out = split_speakers(samples, fraction, 7)
    assert len({sample.speaker for sample in out}) == held
    assert not {sample.speaker for sample in train} & {sample.speaker for sample in out}
    assert sorted(train + out, key=samples.index) == samples
    assert train == [sample for sample in samples if sample in train]  # in the order given


def test_the_choice_depends_on_seed_and_names_alone() -> None:
    samples = people(10)
    choices = {seed: {s.speaker for s in split_speakers(samples, 0.3, seed)[1]} for seed in range(20)}
    assert len({frozenset(choice) for choice in choices.values()}) > 10
    for seed, choice in choices.items():
        assert {s.speaker for s in split_speakers(samples[::-1], 0.3, seed)[1]} == choice
        assert {s.speaker for s in split_speakers(people(10, each=1), 0.3, seed)[1]} == choice


def test_splits_that_cannot_be_made() -> None:
    assert split_speakers(people(1), 0, 1) == (people(1), [])
    with pytest.raises(ManifestError, match=r"cannot hold out 0.5 of 1 speaker\(s\): at least 2 are needed"):
        split_speakers(people(1), 0.5, 1)
    with pytest.raises(ManifestError, match=r"text:3: a: no speaker, so speakers cannot be held out"):
        split_speakers([Sample("a", "x", None, source="text:3"), *people(3)], 0.5, 1)


def shown(folder: Path, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=300)
    print_report(validate(folder, DataConfig(), **options), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_validate_shows_statistics(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    report = validate(corpus.write(), DataConfig(), deep=True)
    assert report.issues == []
    assert (report.statistics["num_rows"], report.statistics["num_samples"]) == (4, 4)
    train = report.statistics["pronunciation"]["train"]
    counts = {name: train[name] for name in ("utterances", "speakers", "words", "phones", "mispronounced")}
    assert counts == {"utterances": 3, "speakers": 2, "words": 6, "phones": 18, "mispronounced": 3}
    assert train["prevalence"] == round(3 / 18, 5)
    assert train["scores"] == {name: {str(int(value)): 3} for name, value in SCORES.items()}
    assert (train["genders"], train["ages"]) == ({"f": 2}, {"6": 1, "7": 1})
    assert train["pronounced_counts"] == {"D Z": 3}
    assert train["phone_counts"]["AY"] == 3
    assert run_validate(corpus.folder, metadata_only=True, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["statistics"]["pronunciation"]["test"]["phones"] == 6
    text = shown(corpus.folder)
    for wanted in ("mispronounced phones: 3 of 18 (16.67%)", "ages  6: 1  7: 1", "prosodic  7: 3", "no issues"):
        assert wanted in text, wanted


def test_validate_lists_the_issues_of_both_splits(corpus: Corpus) -> None:
    corpus.scores["u2"]["total"] = 11
    corpus.scores["t1"]["total"] = 12
    corpus.sound("WAVE/SPEAKER01/u1.WAV", 41)
    report = validate(corpus.write(), DataConfig())
    assert [(issue.sample_id, issue.code) for issue in report.issues] == [
        ("u2", "bad_score"),
        ("t1", "bad_score"),
        ("u1", "too_long"),
    ]
    assert [report.statistics["pronunciation"][split]["utterances"] for split in ("train", "test")] == [1, 0]
    assert "'total' is 12, outside 0 to 10" in shown(corpus.folder)


@pytest.mark.parametrize(("speaker", "utterance", "what"), [("01", "t1", "speaker 01"), ("09", "u1", "utterance")])
def test_validate_finds_overlapping_splits(corpus: Corpus, speaker: str, utterance: str, what: str) -> None:
    tables = corpus.tables["test"]
    tables["text"] = [f"{utterance} HI LISA"]
    tables["wav.scp"] = [f"{utterance} WAVE/SPEAKER09/t1.WAV"]
    tables["utt2spk"] = [f"{utterance} {speaker}"]
    tables["spk2age"], tables["spk2gender"] = [f"{speaker} 6"], [f"{speaker} f"]
    (issue,) = validate(corpus.write(), DataConfig()).issues
    assert isinstance(issue, Issue)
    assert (issue.code, issue.message) == ("split_overlap", f"the {what} also stands in the training split")
    assert issue.source.endswith("test/text:1")


@mini
def test_the_real_mini_set() -> None:
    results = {split: read_speechocean(MINI, split, DataConfig()) for split in ("train", "test")}
    assert {split: len(result.samples) for split, result in results.items()} == {"train": 600, "test": 300}
    assert [issue for result in results.values() for issue in result.issues] == []
    speakers = {split: {sample.speaker for sample in result.samples} for split, result in results.items()}
    assert {split: len(names) for split, names in speakers.items()} == {"train": 30, "test": 15}
    assert not speakers["train"] & speakers["test"]
    assert results["train"].notes == ["train: utterances without 'completeness' (600)"]
    assert set(results["test"].notes) == {
        f"test: words without {name!r} (1928)" for name in ("accuracy", "stress", "total")
    }
    for sample in (sample for result in results.values() for sample in result.samples):
        for word in labels_of(sample).words:
            assert set(word.phones) <= set(PHONES)
            wrong = {item.index for item in word.mispronunciations}
            assert wrong == {index for index, value in enumerate(word.phone_accuracies) if value < 0.5}
            said = ["<unk>" if index in wrong else phone for index, phone in enumerate(word.phones)]
            assert realised_phones(word.phones, word.mispronunciations) == said
    train, held = split_speakers(results["train"].samples, 0.1, 42)
    assert (len(train), len(held)) == (540, 60)
    assert not {sample.speaker for sample in train} & {sample.speaker for sample in held}


@mini
def test_validate_the_real_mini_set() -> None:
    report = validate(MINI, DataConfig())
    assert report.issues == []
    values = report.statistics["pronunciation"]
    assert (values["train"]["phones"], values["test"]["phones"]) == (11492, 5697)
    # 3.6 % of the whole corpus; these speakers were not drawn by their errors
    assert 0.03 <= values["train"]["prevalence"] <= 0.05
    assert 0.01 <= values["test"]["prevalence"] <= 0.03
    assert len(values["train"]["phone_counts"]) == len(values["test"]["phone_counts"]) == 39
    assert sum(values["train"]["genders"].values()) == 30
    assert sum(values["test"]["scores"]["completeness"].values()) == 300
