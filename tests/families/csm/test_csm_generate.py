"""Generation: the native class's rows on the same prompt, options of both decoders, and where speech is cut."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CsmProcessor, EncodecFeatureExtractor
from transformers import PreTrainedTokenizerBase as Tokenizer

from csm_cases import CODEBOOKS, FP32, Case, family_on, train, turn_text
from speechtune.audio import read_audio
from speechtune.errors import ConfigError
from speechtune.families.csm.family import CsmFamily
from speechtune.families.csm.layout import cut_rows
from speechtune.types import GenerationOptions

GREEDY = GenerationOptions(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def model(family: CsmFamily) -> Any:
    """A fresh base; generation must leave it as it is."""
    return family.load(FP32).eval()


@pytest.fixture(scope="module")
def overfitted(family: CsmFamily, cases: list[Case]) -> Any:
    """A model that knows both utterances by heart."""
    return train(family, cases, family.load(FP32), 110)


def test_rows_are_the_native_ones(
    family: CsmFamily, model: Any, native: Any, tokenizer: Tokenizer, cases: list[Case]
) -> None:
    """Processor, codec in the model, ids in two dimensions: the same rows as from codes in the cache."""
    case = cases[0]
    processor = CsmProcessor(EncodecFeatureExtractor(sampling_rate=24_000), tokenizer)
    reference = case.sample.references[0]
    text = f"{turn_text(reference.text)}<|AUDIO|><|audio_eos|>{turn_text(case.sample.text)}"
    inputs = processor(text, read_audio(reference.audio, 24_000).samples, return_tensors="pt")
    with torch.no_grad():
        greedy = {"do_sample": False, "suppress_tokens": [64, 65, 66]}
        greedy |= {f"depth_decoder_{name}": value for name, value in greedy.items()}
        rows = native.generate(**inputs, max_new_tokens=12, **greedy)
    np.testing.assert_array_equal(rows.numpy(), family.generate_rows(model, [case.question], GREEDY))


def test_batch_mates_change_nothing(family: CsmFamily, overfitted: Any, cases: list[Case]) -> None:
    """Prompts of different lengths, one with a reference, one without: each answer is that of the prompt alone."""
    together = family.generate(overfitted, [case.question for case in cases], GenerationOptions(temperature=0))
    for case, output in zip(cases, together, strict=True):
        (alone,) = family.generate(overfitted, [case.question], GenerationOptions(temperature=0))
        np.testing.assert_array_equal(alone.arrays["codes"], output.arrays["codes"])
        np.testing.assert_array_equal(output.arrays["codes"], case.codes)
        assert output.stopped and output.num_tokens == len(case.codes) + 1
        assert output.audio is not None and len(output.audio.samples) == len(case.codes) * 1920


def test_a_batch_with_seeds_is_what_each_would_be_alone(family: CsmFamily, model: Any, cases: list[Case]) -> None:
    prompts = [case.question for case in cases]
    options, seeds = GenerationOptions(max_new_tokens=8), (3, 3)
    together = family.generate(model, prompts, replace(options, seeds=seeds))
    alone = [family.generate(model, [one], replace(options, seed=s))[0] for one, s in zip(prompts, seeds, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert len(one.arrays["codes"]) and np.array_equal(one.arrays["codes"], other.arrays["codes"])


def test_options_of_the_depth_decoder_do_not_stay(family: CsmFamily, model: Any, cases: list[Case]) -> None:
    """transformers leaves them on the model, and a save would write them into its files."""
    before = copy.deepcopy(model.depth_decoder.generation_config.to_dict())
    family.generate_rows(model, [cases[0].question], GREEDY)
    assert model.depth_decoder.generation_config.to_dict() == before
    assert before["do_sample"] is True and before["top_k"] == 50


def test_greedy_is_greedy_in_both_decoders(family: CsmFamily, model: Any, cases: list[Case]) -> None:
    """`do_sample=False` leaves the depth decoder sampling; a seed must not matter. With a temperature it does."""

    def rows(**options: Any) -> np.ndarray:
        return family.generate_rows(model, [cases[0].question], GenerationOptions(max_new_tokens=8, **options))

    np.testing.assert_array_equal(rows(temperature=0, seed=1), rows(temperature=0, seed=2))
    np.testing.assert_array_equal(rows(seed=1), rows(seed=1))
    assert not np.array_equal(rows(seed=1)[..., 1:], rows(seed=2)[..., 1:])
    np.testing.assert_array_equal(rows(top_k=1, seed=1), rows(top_k=1, seed=2))  # reaches both, too


def test_only_codes_that_the_codec_has(family: CsmFamily, model: Any, cases: list[Case]) -> None:
    """Three ids more than codes: one of them would make Mimi fail. Here a sampler that is nearly uniform."""
    options = GenerationOptions(temperature=50.0, top_k=67, max_new_tokens=60)
    outputs = family.generate(model, [cases[1].question], options)
    codes = outputs[0].arrays["codes"]
    assert codes.max() < 64 and len(np.unique(codes)) > 50
    assert not outputs[0].stopped and outputs[0].num_tokens == 60


def test_a_cap_is_no_end(family: CsmFamily, overfitted: Any, cases: list[Case]) -> None:
    options = GenerationOptions(temperature=0, max_new_tokens=9)
    (output,) = family.generate(overfitted, [cases[0].question], options)
    assert not output.stopped and output.num_tokens == 9
    np.testing.assert_array_equal(output.arrays["codes"], cases[0].codes[:9])


def test_speech_is_cut_by_the_native_rule() -> None:
    """Zeros in all codebooks but the last; a zero elsewhere is a code; what follows the end is noise."""
    rows = np.array([[0, 5, 0], [3, 0, 0], [0, 0, 5], [7, 7, 7], [0, 0, 0]])
    codes, stopped = cut_rows(rows, 0)
    assert codes.tolist() == [[0, 5, 0], [3, 0, 0]] and stopped
    codes, stopped = cut_rows(rows[:2], 0)
    assert len(codes) == 2 and not stopped


def test_an_end_at_once_is_silence(family: CsmFamily, native: Any, cases: list[Case]) -> None:
    """Mimi fails on no frames."""
    with torch.no_grad():  # heads that always say 0
        native.backbone_model.norm.weight.zero_()
        native.depth_decoder.model.norm.weight.zero_()
    (output,) = family.generate(native, [cases[0].question], GREEDY)
    assert output.stopped and output.num_tokens == 1 and output.audio is not None and len(output.audio.samples) == 0


@pytest.mark.parametrize("name", ["ras_win_len", "ras_win_max_num_repeat"])
def test_options_it_does_not_have_are_refused(family: CsmFamily, model: Any, cases: list[Case], name: str) -> None:
    with pytest.raises(ConfigError, match="no repetition-aware sampling"):
        family.generate_rows(model, [cases[0].question], GenerationOptions(**{name: 2}))


def test_cap_without_one_named(base: Path, cases: list[Case]) -> None:
    """30 seconds, or what the positions of the base leave room for."""
    family = family_on(base)
    asked: list[int] = []

    class Model(torch.nn.Module):
        """Stands in for the native class, and notes the cap."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

        def generate(self, max_new_tokens: int, **_: Any) -> torch.Tensor:
            asked.append(max_new_tokens)
            return torch.zeros(1, 1, CODEBOOKS, dtype=torch.long)

    model, ask = Model(family.load(FP32)), cases[0].question
    family.generate_rows(model, [ask], GenerationOptions())
    family.model_config.max_position_embeddings = 100
    family.generate_rows(model, [ask], GenerationOptions())
    assert asked == [375, 100 - len(family.prompt_arrays(*ask)["input_ids"])]


def test_a_target_is_not_used(family: CsmFamily, model: Any, cases: list[Case]) -> None:
    """A sample with its recording asks the same as one without."""
    sample, features = cases[0].question
    both = [family.generate_rows(model, [(one, features)], GREEDY) for one in (sample, cases[0].sample)]
    np.testing.assert_array_equal(*both)
