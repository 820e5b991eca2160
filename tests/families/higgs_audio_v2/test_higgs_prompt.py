"""The prompt: the same tokens in training and in generation, and the same as the native processor's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import HiggsAudioV2Processor, PreTrainedTokenizerBase

from helpers import delayed_rows, expanded_prompt, prompt_text
from higgs_cases import Case, collated
from speechtune.audio import read_audio
from speechtune.errors import ManifestError
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.higgs_audio_v2.layout import render_prompt
from speechtune.types import Clip

HEAD = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
SCENE = (
    "Generate audio following instruction.\n\n"
    "<|scene_desc_start|>\nAudio is recorded from a quiet room.\n<|scene_desc_end|>"
)
USER = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
SPEAKS = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>"
CLIP = "<|AUDIO_OUT|><|audio_eos|>"


def test_training_prompt_is_the_generation_prompt(tiny_family: HiggsAudioV2Family, cases: list[Case]) -> None:
    """Up to and with the target's `<|audio_out_bos|>` a model sees in training exactly what it sees in use."""
    for case in cases:
        encoded = tiny_family.encode(case.sample, case.features)
        asked = replace(case.sample, audio=None)
        ids, rows = tiny_family.prompt_arrays(asked, case.features[:-1], with_target=False)
        np.testing.assert_array_equal(encoded.arrays["input_ids"][: len(ids)], ids)
        np.testing.assert_array_equal(encoded.arrays["audio_rows"][: len(rows)], rows)
        assert len(encoded.arrays["input_ids"]) == len(ids) + case.utterance.rows + 2
        assert len(encoded.arrays["audio_rows"]) == len(rows) + case.utterance.rows


@pytest.mark.parametrize("with_target", [True, False])
def test_tokens_are_those_of_the_prompt_in_one_string(
    tiny_family: HiggsAudioV2Family, tokenizer: PreTrainedTokenizerBase, cases: list[Case], with_target: bool
) -> None:
    """Token for token and cell for cell what the independent helpers make of the authors' prompt."""
    for case in cases:
        sample = case.sample if with_target else replace(case.sample, audio=None)
        features = case.features if with_target else case.features[:-1]
        ids, rows = tiny_family.prompt_arrays(sample, features, with_target=with_target)
        text, expected_rows = expanded_prompt(case.utterance, with_target=with_target)
        np.testing.assert_array_equal(ids, tokenizer(text, add_special_tokens=False)["input_ids"])
        np.testing.assert_array_equal(rows, expected_rows)


def test_tokens_are_those_of_the_native_processor(
    tiny_family: HiggsAudioV2Family, native_processor: HiggsAudioV2Processor, cases: list[Case]
) -> None:
    """The processor encodes the audio with the codec itself, expands the placeholders and delays the rows."""
    audio = [read_audio(ref, 24_000).samples for case in cases for ref in tiny_family.clips(case.sample)]
    native = native_processor(
        text=[prompt_text(case.utterance, with_target=True) for case in cases],
        audio=audio,
        return_tensors="pt",
        padding_side="right",
        add_special_tokens=False,
        sampling_rate=24_000,
    )
    config = tiny_family.config
    padding = HiggsAudioV2Family(
        config.model_copy(update={"batch": config.batch.model_copy(update={"packing": False})})
    )
    ours = collated(padding, cases).inputs
    rows = native["audio_input_ids"][native["audio_input_ids_mask"].bool()]
    for name, expected in (*native.items(), ("audio_rows", rows)):
        if name in ours:
            np.testing.assert_array_equal(ours[name].numpy(), expected.numpy(), err_msg=name)
    assert {"input_ids", "attention_mask", "audio_rows"} <= ours.keys() and len(rows)


def test_layouts(cases: list[Case]) -> None:
    """Without reference, with several, with a system message or scene of its own; texts are trimmed at both ends."""
    sample = replace(cases[0].sample, text=" new words\n", references=(), audio=None)
    clip = cases[0].sample.audio
    assert clip is not None
    expected = {
        "none": (sample, HEAD + SCENE + USER + "new words" + SPEAKS),
        "two": (
            replace(sample, references=(Clip(clip, "one "), Clip(clip, "two"))),
            HEAD + SCENE + USER + "one" + SPEAKS + CLIP + USER + "two" + SPEAKS + CLIP + USER + "new words" + SPEAKS,
        ),
        "system": (replace(sample, system="Be brief."), HEAD + "Be brief." + USER + "new words" + SPEAKS),
        "scene": (
            replace(sample, system="Be brief.", scene="A hall."),
            f"{HEAD}Be brief.\n\n<|scene_desc_start|>\nA hall.\n<|scene_desc_end|>{USER}new words{SPEAKS}",
        ),
    }
    for name, (given, text) in expected.items():
        assert render_prompt(given, with_target=False) == text, name
        assert render_prompt(given, with_target=True) == text + CLIP + "<|eot_id|>", name


def test_clips_keep_their_order(tiny_family: HiggsAudioV2Family, cases: list[Case]) -> None:
    """Issue: the audio index shifted onto the wrong clip. References first, in order, then the target."""
    one, two = cases
    sample = replace(one.sample, references=(*one.sample.references, *two.sample.references))
    assert tiny_family.clips(sample) == (*(voice.audio for voice in sample.references), sample.audio)
    features = [one.features[0], two.features[0], one.features[1]]
    rows = tiny_family.encode(sample, features).arrays["audio_rows"]
    np.testing.assert_array_equal(rows, np.concatenate([delayed_rows(codes) for codes in features]))


@pytest.mark.parametrize("field", ["text", "system", "scene", "reference"])
def test_special_tokens_in_texts_are_refused(tiny_family: HiggsAudioV2Family, cases: list[Case], field: str) -> None:
    """A text that holds a control token would end the turn, or add a clip that is not there."""
    case, bad = cases[0], "say <|eot_id|> now"
    if field == "reference":
        sample = replace(case.sample, references=(Clip(case.sample.references[0].audio, bad),))
    else:
        sample = replace(case.sample, **{field: bad})
    with pytest.raises(ManifestError, match=r"special token '<\|eot_id\|>'"):
        tiny_family.encode(sample, case.features)
