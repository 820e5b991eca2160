"""Answers read: valid ones, a table of damaged ones, and megabytes of garbage."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from speechtune.tasks.pronunciation.answers import MAX_TOKENS, read_answer
from speechtune.tasks.pronunciation.targets import TASKS, Task, render_answer

FOUR = {"accuracy": 8.0, "fluency": 7.0, "prosodic": 9.0, "total": 10.0}
BOTH = {"word_transcript": "don't call", "phones": ["D", "OW", "<unk>", "K"]}


def parse_answer(task: Task, text: str | None) -> dict[str, Any] | None:
    return read_answer(task, text).values or None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (render_answer({"accuracy": 8, "fluency": 7, "prosodic": 9, "total": 10}), FOUR),
        ("{'accuracy': 8, 'fluency': 7, 'prosodic': 9, 'total': 10}", FOUR),
        ("{“accuracy”: 8, “fluency”: 7, “prosodic”: 9, “total”: 10}", FOUR),
        ('Sure!\n```json\n{"accuracy": 8,\n "fluency": 7, "prosodic": 9, "total": 10\n}\n```\nAnything else?', FOUR),
        ('{"Accuracy": "8", "FLUENCY": 7.0, "Prosody": "9/10", "Total score": "10 / 10"}', FOUR),
        ("accuracy: 8, fluency: 7, prosodic: 9, total: 10", FOUR),
        ("**accuracy**: 8\n**fluency**: 7\n- prosodic = 9 out of 10\n- total: 10/10", FOUR),
        ('accuracy: 1 says little. {"accuracy": 8, "fluency": 7, "prosodic": 9, "total": 10}', FOUR),
        ('{"scores": {"completeness": 3, "accuracy": 8, "fluency": 7, "prosodic": 9, "total": 10}}', FOUR),
        ('{"accuracy": 8, "fluency": 7, "prosodic": 9, "total": 10} {"accuracy": 1, "fluency": 1}', FOUR),
        ('{"accuracy": 1, "accuracy": 8, "total": 10', {"accuracy": 8.0}),
        ('{"accuracy": 8, "fluency": 7,', {"accuracy": 8.0, "fluency": 7.0}),
        ('{"accuracy": 8, "fluency": 1', {"accuracy": 8.0}),
        ('{"accuracy": 8, "fluency": "7', {"accuracy": 8.0}),
        ('{"accuracy": 8, "flu', {"accuracy": 8.0}),
        ('{"accuracy": 8.5, "fluency": 11, "prosodic": -3, "total": 1000}', {"accuracy": 8.5}),
        ('{"accuracy": 80%, "fluency": 7/100, "prosodic": 4 / 5, "total": 8e1}', None),
        ('{"accuracy": NaN, "fluency": null, "prosodic": "eight", "total": true}', None),
        ('{"word_accuracy": 8, "inaccuracy": 3}', None),
        ('{"accuracy": [8]}', None),
        ("7", None),
        ("", None),
        (None, None),
    ],
)  # fmt: skip
def test_scores_are_read(text: str | None, expected: dict[str, float] | None) -> None:
    assert parse_answer("APA", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (render_answer({"word_transcript": "don't call", "phoneme_transcript": "D OW <unk> K"}), BOTH),
        ("{'word_transcript': 'don't call', 'phoneme_transcript': 'D OW <unk> K'}", BOTH),
        ("{'word_transcript': 'don\\'t call', 'phoneme_transcript': 'D OW <unk> K',}", BOTH),
        ('{"word transcript": "don’t call", "phone_transcript": "d ow1 <UNK> k"}', BOTH),
        ('{"wordTranscript": "don\'t call", "phonemeTranscript": ["D", "OW0", "<unk>", "K"]}', BOTH),
        ('{"Phonemes": [["D", "OW0"], ["<unk>", "K*", "<DEL>"]], "Word-Transcript": ["don\'t", "call"]}', BOTH),
        ('{"word_transcript": "don\'t call, "phoneme_transcript": "D OW <unk> K"}', BOTH),
        ('```\n{word_transcript: don\'t call, phoneme_transcript: /D OW, unk K/}\n```', BOTH),
        ("word_transcript: don't call\nphoneme_transcript: D-OW-<unk>-K\n\nThat's it.", BOTH),
        ('{"word_transcript": "don\'t call", "phoneme_transcript": "D OW <unk> K S', BOTH),
        ('{"word_transcript": "don\'t call", "phoneme_transcript": "D OW <unk> K ', BOTH),
        ('{"word_transcript": "don\'t call", "phoneme_transcript": ["D", "OW", "<unk>", "K", "S', BOTH),
        ('{"word_transcript": "don\'t call", "phoneme_transcript": "D', {"word_transcript": "don't call"}),
        ('{"phoneme_transcript": "D OW <unk> K", "word_transcript": "don\'t ca', {"phones": BOTH["phones"]}),
        ('{"word_transcript": null, "phoneme_transcript": ""}', {"phones": []}),
        ('{"word_transcript": "a \\u00e9 \\ud83d \\"b\\""} {}', {"word_transcript": 'a é � "b"'}),
        ('{"words": "say \\"{no}\\"", "phones": "T"}', {"word_transcript": 'say "{no}"', "phones": ["T"]}),
        ('{"word_transcript": "a bear, "phoneme_transcript": "T}', {"word_transcript": "a bear", "phones": ["T"]}),
        ('{"word_transcript": a be', None),
        ('{"word_transcript": "don', None),
        ("{'word_transcript': 'don't ca", None),
        ('{"word_transcript":', None),
        ('{"accuracy": 8}', None),
    ],
)  # fmt: skip
def test_transcripts_are_read(text: str, expected: dict[str, Any] | None) -> None:
    assert parse_answer("MDD", text) == expected


def test_what_is_known_beside_the_values() -> None:
    complete = read_answer("MDD", '{"word_transcript": "a", "phoneme_transcript": "ah0 xx3 θ <DEL> T"}')
    assert not complete.truncated
    assert complete.values["phones"] == ["AH", "XX3", "Θ", "T"] and complete.unknown_labels == 2
    assert complete.raw_phones == ["ah0", "xx3", "θ", "<DEL>", "T"]
    for task, text in (
        ("MDD", '{"word_transcript": "a", "phoneme_transcript": "T EH'),
        ("MDD", '{"word_transcript": "a", "phoneme_transcript": "T EH"'),
        ("APA", '{"accuracy": 8, "fluency": 1'),
    ):
        cut = read_answer(task, text)
        assert cut.truncated
    nothing = read_answer("MDD", '{"word_transcript": "a ca')
    assert nothing.truncated and not nothing.values
    prose = read_answer("MDD", "There is no speech.")
    assert not prose.truncated and read_answer("MDD", "").values == {}
    bare = read_answer("APA", "accuracy: 8")
    assert not bare.truncated


def test_every_cut_of_an_answer_keeps_only_what_is_right() -> None:
    for task, answer, expected in (
        ("APA", {"accuracy": 8, "fluency": 7, "prosodic": 9, "total": 10}, FOUR),
        ("MDD", {"word_transcript": "don't call", "phoneme_transcript": "D OW <unk> K"}, BOTH),
    ):
        text = render_answer(answer)
        for end in range(len(text)):
            for name, value in (parse_answer(task, text[:end]) or {}).items():
                assert value == (expected[name][: len(value)] if name == "phones" else expected[name]), text[:end]
        assert parse_answer(task, text) == expected


MEGABYTE = 1_000_000
GARBAGE = [
    "{", "[", "(", '"', "'", "\\", " ", "9", "}", "```", "a", "\n", '",', '{"a":', "[{", '" ', "accuracy: ", "words:",
    '{"words": "a ', 'words:"a"b ', '"phones":[', 'words: \'a\'b, ', '"phones": "AH ', '{"accuracy":',
]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("start", ["", '{"accuracy": ', '{"words": "', '{"phones": [', "words: "])
def test_a_megabyte_of_garbage_is_read_in_two_seconds(task: Any, start: str) -> None:
    for piece in GARBAGE:
        begun = time.process_time()
        parse_answer(task, start + piece * (MEGABYTE // len(piece)))
        assert time.process_time() - begun < 2, piece


def test_random_garbage_does_not_crash() -> None:
    generator = random.Random(0)
    alphabet = [
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        ",",
        ":",
        " ",
        "\n",
        "\\",
        "word_transcript",
        "phones",
        "accuracy",
        "8",
        "K",
    ]
    for _ in range(3000):
        text = "".join(generator.choices([*alphabet, "\\ud83d", "\ud83d", "<unk>", "\0"], k=generator.randint(1, 40)))
        for task in TASKS:
            answer = parse_answer(task, text)
            assert answer is None or answer
            json.dumps(answer)


def test_a_model_that_loops_gives_no_endless_transcript() -> None:
    found = parse_answer("MDD", json.dumps({"word_transcript": "a " * 9000, "phoneme_transcript": "AH " * 9000}))
    assert found is not None and len(found["phones"]) == len(found["word_transcript"].split()) == MAX_TOKENS
