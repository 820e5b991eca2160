"""Generation: batches, the length cap, seeds, and options that reach the model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from helpers import STREAM_EOS, native_batch
from higgs_cases import FP32, Case, family_on
from speechtune.errors import ConfigError
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.higgs_audio_v2.layout import delay_rows, undelay
from speechtune.types import GenerationOptions, Sample

GREEDY = GenerationOptions(temperature=0, max_new_tokens=60)


@pytest.fixture
def model(tiny_family: HiggsAudioV2Family) -> Any:
    """A fresh base: it talks on and on."""
    return tiny_family.load(FP32).eval()


@pytest.fixture(scope="module")
def learnt(overfitted: Path, tiny_base: Path) -> tuple[HiggsAudioV2Family, Any]:
    """The family on the overfitted model, which stops."""
    family = family_on(overfitted, tiny_base / "codec")
    return family, family.load(FP32).eval()


def prompts_of(cases: Sequence[Case]) -> list[tuple[Sample, Sequence[np.ndarray]]]:
    """The cases without their targets."""
    return [(replace(case.sample, audio=None), case.features[:-1]) for case in cases]


def test_trained_utterances_come_back(learnt: tuple[HiggsAudioV2Family, Any], cases: list[Case]) -> None:
    """Codes, the place of the end, the number of rows, and 40 ms of audio per frame."""
    family, model = learnt
    for case, output in zip(cases, family.generate(model, prompts_of(cases), GREEDY), strict=True):
        np.testing.assert_array_equal(output.arrays["codes"], case.utterance.codes)
        assert output.sample_id == case.sample.id
        assert (output.stopped, output.num_tokens) == (True, case.utterance.rows)
        assert output.audio is not None
        assert len(output.audio.samples) == len(case.utterance.codes) * 960


def test_batch_equals_one_by_one(learnt: tuple[HiggsAudioV2Family, Any], cases: list[Case]) -> None:
    """Prompts of different lengths, one without reference: padding and an earlier end of a mate change nothing."""
    family, model = learnt
    bare = Sample("bare", "Quite another text", None)
    prompts = [*prompts_of(cases), (bare, [])]
    lengths = {len(family.prompt_arrays(*prompt, with_target=False)[0]) for prompt in prompts}
    assert len(lengths) == 3
    together = family.generate(model, prompts, GREEDY)
    for prompt, output in zip(prompts, together, strict=True):
        alone = family.generate(model, [prompt], GREEDY)[0]
        np.testing.assert_array_equal(output.arrays["rows"], alone.arrays["rows"])
        assert (output.stopped, output.num_tokens) == (alone.stopped, alone.num_tokens)
    assert len({output.num_tokens for output in together}) > 1


@pytest.mark.parametrize(
    ("chosen", "texts"),
    [((1, 0), (None, None)), ((0, 0, 0), (None, "Quite another text, and long.", "Quiet.")), ((0, 0), (None, None))],
    ids=["other references", "one reference", "twice the same"],
)
def test_a_batch_computes_no_more_than_it_needs(
    learnt: tuple[HiggsAudioV2Family, Any], cases: list[Case], chosen: Sequence[int], texts: Sequence[str | None]
) -> None:
    """What prompts begin with in common once, samples that ended no more; the rows are those of plain transformers."""
    family, model = learnt
    utterances = [
        replace(cases[number].utterance, text=text or cases[number].utterance.text)
        for number, text in zip(chosen, texts, strict=True)
    ]
    prompts = [
        (replace(sample, text=utterance.text), codes)
        for (sample, codes), utterance in zip(prompts_of([cases[i] for i in chosen]), utterances, strict=True)
    ]
    shapes: list[tuple[int, ...]] = []
    count = model.model.layers[0].register_forward_hook(lambda module, args, states: shapes.append(states.shape[:2]))
    found = family.generate_rows(model, prompts, GREEDY)
    count.remove()

    inputs = native_batch(family.tokenizer, utterances, with_target=False, left=True)
    options = {"max_new_tokens": 60, "do_sample": False, "ras_win_len": None, "ras_win_max_num_repeat": None}
    native = model.generate(**inputs, **options)[:, inputs["audio_input_ids"].shape[1] :].numpy()
    np.testing.assert_array_equal(found, native)

    marks = family.tokenizer.convert_tokens_to_ids(["<|AUDIO_OUT|>", "<|reserved_special_token_6|>"])
    paths = []
    for ids, mask, rows in zip(*(inputs[n] for n in ("input_ids", "attention_mask", "audio_input_ids")), strict=True):
        left = iter(rows.tolist())
        paths.append([(token, next(left) if token in marks else None) for token in ids[mask == 1].tolist()])
    same = [all(step == steps[0] for step in steps) for steps in zip(*paths, strict=False)]
    shared = min([*same, False].index(False), len(same) - 1)
    longest = max(map(len, paths))
    assert shared > 50 and shapes[:2] == [(1, shared), (len(paths), longest - shared)]
    ends = [int((rows != STREAM_EOS).any(axis=1).sum()) for rows in native]
    running = [sum(end >= step for end in ends) for step in range(1, max(ends) + 1)]
    assert [size for size, _ in shapes[2:]] == running[: len(shapes) - 2]


def test_what_breaks_off_leaves_nothing_behind(tiny_family: HiggsAudioV2Family, model: Any, cases: list[Case]) -> None:
    """A server leaves a batch from within a step; the next answers are the same as before."""
    options = GenerationOptions(max_new_tokens=6, seeds=(1, 2))
    before = tiny_family.generate_rows(model, prompts_of(cases[:2]), options)
    steps: list[object] = []

    def leave(*_: object) -> None:
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt

    for module in (model, model.model.layers[0]):
        steps.clear()
        handle = module.register_forward_pre_hook(leave)
        with pytest.raises(KeyboardInterrupt):
            tiny_family.generate_rows(model, prompts_of(cases[:2]), options)
        handle.remove()
        three = torch.ones(3, 4)
        torch.manual_seed(5)
        drawn = torch.multinomial(three, 1)
        assert torch.equal(drawn, torch.multinomial(three, 1, generator=torch.Generator().manual_seed(5)))
        np.testing.assert_array_equal(tiny_family.generate_rows(model, prompts_of(cases[:2]), options), before)


def test_a_batch_with_seeds_is_what_each_would_be_alone(
    tiny_family: HiggsAudioV2Family, model: Any, cases: list[Case]
) -> None:
    """Also where codes are drawn anew, by repetition-aware sampling."""
    (first, codes), (second, more) = prompts_of(cases)
    prompts = [(first, codes), (second, more), (first, codes), (replace(second, references=()), [])]
    options = GenerationOptions(max_new_tokens=30, temperature=0.5, top_k=2, ras_win_len=4, ras_win_max_num_repeat=1)
    seeds = (1, 1, 2, 3)
    together = tiny_family.generate(model, prompts, replace(options, seeds=seeds))
    alone = [
        tiny_family.generate(model, [one], replace(options, seed=s))[0] for one, s in zip(prompts, seeds, strict=True)
    ]
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.arrays["rows"], other.arrays["rows"])
    assert not np.array_equal(together[0].arrays["rows"], together[2].arrays["rows"])


def test_cap_is_reported(tiny_family: HiggsAudioV2Family, model: Any, cases: list[Case]) -> None:
    """An output that met the length cap says so; its complete frames are kept."""
    output = tiny_family.generate(model, prompts_of(cases[:1]), replace(GREEDY, max_new_tokens=20))[0]
    assert (output.stopped, output.num_tokens) == (False, 20)
    assert output.arrays["codes"].shape == (20 - 8, 8)
    shortest = tiny_family.generate(model, prompts_of(cases[:1]), replace(GREEDY, max_new_tokens=3))[0]
    assert shortest.audio is not None and len(shortest.audio.samples) == 0


def test_seeds_are_reproducible(tiny_family: HiggsAudioV2Family, model: Any, cases: list[Case]) -> None:
    """The seed decides, not the state the process is in."""
    options = GenerationOptions(max_new_tokens=15, seed=1)
    first = tiny_family.generate_rows(model, prompts_of(cases), options)
    torch.randn(5)
    np.testing.assert_array_equal(first, tiny_family.generate_rows(model, prompts_of(cases), options))
    assert (first != tiny_family.generate_rows(model, prompts_of(cases), replace(options, seed=2))).any()


def test_options_reach_the_model(
    tiny_family: HiggsAudioV2Family, model: Any, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given is passed on, what is not is left to the model's own generation config."""
    seen: list[GenerationConfig] = []
    sample = type(model)._sample

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["generation_config"])
        return sample(*args, **kwargs)

    monkeypatch.setattr(type(model), "_sample", recording)
    full = GenerationOptions(0.7, 5, 0.9, ras_win_len=6, ras_win_max_num_repeat=3, max_new_tokens=4)
    for options in (full, GenerationOptions(max_new_tokens=4), replace(full, temperature=0)):
        tiny_family.generate_rows(model, prompts_of(cases), options)
    names = ("do_sample", "temperature", "top_k", "top_p", "ras_win_len", "ras_win_max_num_repeat", "max_new_tokens")
    assert [getattr(seen[0], name) for name in names] == [True, 0.7, 5, 0.9, 6, 3, 4]
    assert [getattr(seen[1], name) for name in names] == [True, 1.0, 50, 0.95, 7, 2, 4]
    assert not seen[2].do_sample and seen[2].ras_win_len is None and seen[2].ras_win_max_num_repeat is None


def test_top_k_one_is_greedy(tiny_family: HiggsAudioV2Family, model: Any, cases: list[Case]) -> None:
    """An option that arrives has an effect: with one candidate there is nothing to draw."""
    one = GenerationOptions(top_k=1, ras_win_len=1, ras_win_max_num_repeat=9, max_new_tokens=15)
    greedy = tiny_family.generate_rows(model, prompts_of(cases), replace(GREEDY, max_new_tokens=15))
    np.testing.assert_array_equal(tiny_family.generate_rows(model, prompts_of(cases), one), greedy)


def test_repetition_aware_sampling_breaks_repeats(
    tiny_family: HiggsAudioV2Family, model: Any, cases: list[Case]
) -> None:
    """A model stuck on one code repeats it for ever; with RAS it does not. Greedy leaves RAS out."""

    def favour_code_7(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        bump = torch.zeros(8, 1026)
        bump[:, 7] = 7.5  # above every other logit, and about as probable as all of them together
        return logits + bump.flatten()

    model.audio_lm_head.register_forward_hook(favour_code_7)
    prompts = prompts_of(cases[:1])
    stuck = tiny_family.generate_rows(model, prompts, replace(GREEDY, max_new_tokens=25))[0]
    ras = GenerationOptions(top_k=1, ras_win_len=7, ras_win_max_num_repeat=2, max_new_tokens=25)
    freed = tiny_family.generate_rows(model, prompts, ras)[0]
    own = tiny_family.generate_rows(model, prompts, GenerationOptions(top_k=1, max_new_tokens=25))[0]
    assert (stuck[8:] == 7).all()
    assert 0.3 < (freed[8:] == 7).mean() < 0.95
    np.testing.assert_array_equal(own, freed)  # 7 and 2 are what the base's generation config says


def test_options_reach_a_base_without_generation_config(tiny_base: Path, tmp_path: Path, cases: list[Case]) -> None:
    """transformers refuses an option that the base's generation config does not know."""
    folder = Path(shutil.copytree(tiny_base / "model", tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    family = family_on(folder, tiny_base / "codec")
    model = family.load(FP32).eval()
    options = GenerationOptions(ras_win_len=7, ras_win_max_num_repeat=2, max_new_tokens=4)
    for chosen in (options, GenerationOptions(max_new_tokens=4), replace(GREEDY, max_new_tokens=4)):
        assert family.generate_rows(model, prompts_of(cases[:1]), chosen).shape == (1, 4, 8)


def test_generated_rows_are_plain_transformers(
    tiny_family: HiggsAudioV2Family, model: Any, tokenizer: PreTrainedTokenizerBase, cases: list[Case]
) -> None:
    """A batch of ours is what native `generate` gives for inputs built without speechtune."""
    rows = tiny_family.generate_rows(model, prompts_of(cases), replace(GREEDY, max_new_tokens=20))
    batch = native_batch(tokenizer, [case.utterance for case in cases], with_target=False, left=True)
    native = model.generate(**batch, do_sample=False, ras_win_len=None, max_new_tokens=20)
    np.testing.assert_array_equal(rows, native[:, batch["audio_input_ids"].shape[1] :].numpy())


def test_cap_within_the_delayed_end_is_reported(learnt: tuple[HiggsAudioV2Family, Any], cases: list[Case]) -> None:
    """Codebook 0 ends seven rows before codebook 7: a cap between them cuts frames off, and that is no stop."""
    family, model = learnt
    case = cases[0]
    for missing, frames, stopped in ((0, 12, True), (1, 12, True), (2, 11, False), (7, 6, False), (8, 5, False)):
        options = replace(GREEDY, max_new_tokens=case.utterance.rows - missing)
        output = family.generate(model, prompts_of([case]), options)[0]
        assert (len(output.arrays["codes"]), output.stopped) == (frames, stopped), missing
        np.testing.assert_array_equal(output.arrays["codes"], case.utterance.codes[:frames])


def test_way_back_from_rows() -> None:
    """`undelay` inverts the delay; an end in a later codebook alone ends nothing."""
    codes = (np.arange(12 * 8) * 37 % 1024).reshape(12, 8)
    rows = delay_rows(codes, 1024, 1025)
    found, stopped = undelay(rows, STREAM_EOS, 1024)
    np.testing.assert_array_equal(found, codes)
    assert stopped
    odd = rows[:13].copy()
    odd[6, 3] = STREAM_EOS
    found, stopped = undelay(odd, STREAM_EOS, 1024)
    assert found.shape == (5, 8) and found[2, 3] == 1023 and not stopped
    assert undelay(rows[:5], STREAM_EOS, 1024)[0].shape == (0, 8)


def test_a_missing_codec_is_told_before_anything_is_generated(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a reference only the decoding at the end needs it: hours of work were lost by then."""
    family = family_on(tiny_base / "model", tmp_path / "gone")
    monkeypatch.setattr(HiggsAudioV2Family, "generate_rows", lambda *_: pytest.fail("generated already"))
    with pytest.raises(ConfigError, match="codec_path"):
        family.generate(family.load(FP32), [(Sample("a", "Some text", None), [])], GREEDY)
