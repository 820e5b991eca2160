"""The scripts that make the speaking base: sentences, tokenizer, chains of clips, and training that resumes exactly."""

import argparse
import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoTokenizer

from higgs_cases import FP32, family_on
from speechtune.families.higgs_audio_v2.forward import target_states
from speechtune.types import AudioRef, Clip, GenerationOptions, Sample

pytest.importorskip("pyworld", reason="the codec's vocoder: pip install 'speechtune[demo]'")
EXAMPLE = Path(__file__).parents[3] / "examples" / "speaking_base"
NAMES = ("sentences", "text", "features", "warp", "codes", "chains", "model", "train", "write_base")
SPOKEN = [
    ("The cat sat.", "ðə kˈæt sˈæt."),
    ("A cat, a dog?", "ɐ kˈæt, ɐ dˈɔɡ?"),
    ("Dogs sat on the cat.", "dˈɔɡz sˈæt ˌɔn ðə kˈæt."),
    ("The dog sat on.", "ðə dˈɔɡ sˈæt ˌɔn."),
]
SIZE = 16


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The example's modules; their names are common ones, and are given back."""
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(EXAMPLE))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="module")
def folder(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codec, tokenizer and a shard of codes of one voice, all made up."""
    folder, draw = tmp_path_factory.mktemp("speaking"), np.random.default_rng(0)
    shapes = {"mean": (160,), "components": (6, 160), "pitch": (SIZE, 8), "aperiodicity": (SIZE, 4)}
    shapes |= {f"envelope.{stage}": (SIZE, 6) for stage in range(6)}
    (folder / "codec").mkdir()
    tables = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tables, folder / "codec" / "model.safetensors")
    config = {"model_type": "world_rvq", "num_codebooks": 8, "sampling_rate": 16_000}
    (folder / "codec" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    scripts.text.make_tokenizer(scripts.text.lexicon_of(SPOKEN)).save_pretrained(folder / "tokenizer")
    rows, codes, places = [], [], []
    for index, (text, phonemes) in enumerate(3 * SPOKEN):
        spoken = np.repeat(np.arange(len(phonemes)), 2)
        rows.append({"name": str(index), "split": "train", "voice": "v", "text": text, "phonemes": phonemes})
        rows[-1] |= {"frames": len(spoken)}
        codes.append(draw.integers(SIZE, size=(len(spoken), 8)).astype(np.int16))
        places.append(np.asarray(scripts.codes.places(phonemes), np.int16)[spoken])
    (folder / "codes").mkdir()
    with (folder / "codes" / "shard.npz").open("wb") as file:
        arrays = {"codes": np.concatenate(codes), "places": np.concatenate(places)}
        np.savez(file, rows=np.frombuffer(json.dumps(rows).encode(), np.uint8), **arrays)
    (folder / "features").mkdir()
    with (folder / "features" / "shard.npz").open("wb") as file:
        frames = sum(row["frames"] for row in rows)
        arrays = {"envelope": draw.normal(size=(frames, 160)), "pitch": draw.normal(size=(frames, 8))}
        arrays |= {"aperiodicity": draw.normal(size=(frames, 4)), "spoken": np.zeros(frames)}
        np.savez(file, rows=np.frombuffer(json.dumps(rows).encode(), np.uint8), **arrays)
    return folder


def make_run(scripts: SimpleNamespace, folder: Path, output: Path) -> Any:
    arguments = argparse.Namespace(
        features=folder / "features", codes=folder / "codes", codec=folder / "codec", tokenizer=folder / "tokenizer",
        output=output, seed=0, steps=20, chains=2, chain_positions=160, hidden=32, layers=5, learning_rate=2e-3,
        bf16=False, device="cpu", compile=False,
    )  # fmt: skip
    return scripts.train.Run(arguments)


def test_held_out_sentences_are_said_in_no_training_clip(scripts: SimpleNamespace) -> None:
    held, train = scripts.sentences.held_out_sentences(), scripts.sentences.training_sentences(10_000)
    assert len(held) == len({text.lower() for text in held}) == 200
    assert len({text.lower() for text in train}) == 10_000
    assert not {text.lower() for text in held} & {text.lower() for text in train}
    assert len(scripts.sentences.vocabulary(train)) >= 1_500
    assert train[:100] == scripts.sentences.training_sentences(100)


def test_the_tokenizer_reads_phonemes_of_known_words_and_letters_of_others(
    scripts: SimpleNamespace, folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    symbols = {character: f"/{symbol}/" for symbol, character in scripts.text.CHARACTERS.items()}

    def read(text: str) -> list[str]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [symbols.get(token, token) for token in tokenizer.convert_ids_to_tokens(ids)]

    assert read("The  CAT,") == ["/ð/", "/ə/", " ", "/k/", "/ˈæ/", "/t/", ","]
    assert read("Catsup’s tomcat") == [*"catsup's", " ", *"tomcat"]  # a known word inside another is not that word
    assert read("A cat's café") == ["/ɐ/", " ", *"cat's", " ", *"cafe"]
    assert read("<|eot_id|>on<|audio_out_bos|>") == ["<|eot_id|>", "/ɔ/", "/n/", "<|audio_out_bos|>"]
    assert len(read("<|start_header_id|>user<|end_header_id|>\n\n")) == 3
    assert read("...the cat... sat") == ["/ð/", "/ə/", " ", "/k/", "/ˈæ/", "/t/", ",", " ", "/s/", "/ˈæ/", "/t/"]
    assert read("a user") == ["/ɐ/", " ", *"user"]  # a role is one token where it stands alone


def test_a_chain_is_what_the_family_encodes(scripts: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    """Ids, rows and the last clip's targets of a prompt with one reference; the reference is a target besides."""
    chains = make_run(scripts, folder, tmp_path / "run").chains
    (row, codes, _), (row2, codes2, _) = scripts.chains.read_codes(folder / "codes" / "shard.npz")[1:3]
    clips = chains.clips.by_voice["v"][:2]
    assert clips[0].codes.tolist() == codes.tolist()  # the first of all is kept for development
    ours, guided = chains.chain(clips, random.Random(0), None)
    clip = AudioRef(data=b"clip")
    sample = Sample("sample", row2["text"], clip, (Clip(clip, row["text"]),))
    wanted = chains.family.encode(sample, [codes, codes2])
    for name in ("input_ids", "audio_rows"):
        np.testing.assert_array_equal(ours.arrays[name], wanted.arrays[name])
    for name in ("audio_positions", "audio_targets", "text_positions", "text_targets"):
        np.testing.assert_array_equal(ours.arrays[name][-len(wanted.arrays[name]) :], wanted.arrays[name])
        assert len(ours.arrays[name]) > len(wanted.arrays[name])
    assert len(guided[0]) == len(codes) + len(codes2)


def test_rows_look_at_what_is_spoken_in_the_frame_they_predict(
    scripts: SimpleNamespace, folder: Path, tmp_path: Path
) -> None:
    chains = make_run(scripts, folder, tmp_path / "run").chains
    encoded, (rows, looked_at, tokens, next_tokens) = chains.chain(
        chains.clips.by_voice["v"][:1], random.Random(0), None
    )
    ids = encoded.arrays["input_ids"]
    np.testing.assert_array_equal(ids[looked_at], tokens)
    first_row = int(np.flatnonzero(ids == chains.family.model_config.audio_token_id)[0])
    np.testing.assert_array_equal(rows, first_row + np.arange(len(rows)))
    said = chains.clips.tokenizer.convert_ids_to_tokens(tokens[::2])
    symbols = {character: symbol for symbol, character in scripts.text.CHARACTERS.items()}
    assert "".join(symbols.get(token, token) for token in said) == "ɐ kˈæˈæt, ɐ dˈɔˈɔɡ?"  # a stress takes time too
    assert (next_tokens[:-2] != tokens[:-2]).all()


@pytest.mark.parametrize("drawn", [1, 2])
def test_another_voice_or_room_says_the_same_in_other_codes(
    scripts: SimpleNamespace, folder: Path, tmp_path: Path, drawn: int
) -> None:
    """Guards against warps that are drawn for nothing, rooms without noise, and either that moves what is said."""
    chains, draw = make_run(scripts, folder, tmp_path / "run").chains, random.Random(0)
    room = scripts.warp.random_room(draw, 10, 10)
    silent = replace(room, decibels=-300.0)  # reading made-up envelopes as power changes them by itself
    without, change = {1: ((), (scripts.warp.random_warp(draw),)), 2: ((None, silent), (None, room))}[drawn]
    clips = chains.clips.by_voice["v"][:2]
    made = [chains.chain(clips, random.Random(0), None, *c) for c in (without, change, change)]
    (plain, guided), (other, other_guided), (again, _) = made
    np.testing.assert_array_equal(guided, other_guided)
    np.testing.assert_array_equal(plain.arrays["input_ids"], other.arrays["input_ids"])
    np.testing.assert_array_equal(other.arrays["audio_rows"], again.arrays["audio_rows"])
    assert (plain.arrays["audio_rows"] != other.arrays["audio_rows"]).mean() > (0.5, 0.1)[drawn - 1]
    assert {chains.clips.draw_voice(random.Random(seed))[drawn] is None for seed in range(20)} == {True, False}


def test_noise_adds_to_the_power_of_the_clip(scripts: SimpleNamespace) -> None:
    """Even noise as strong as an even clip doubles its power: log 2 more at every frequency."""
    warp, pyworld = scripts.warp, scripts.warp.pyworld
    bins = pyworld.get_cheaptrick_fft_size(warp.SAMPLING_RATE) // 2 + 1
    one, two = (
        pyworld.code_spectral_envelope(np.full((4, bins), power), warp.SAMPLING_RATE, warp.ENVELOPE_SIZE)
        for power in (1.0, 2.0)
    )
    features = warp.Features(one.reshape(1, -1), np.zeros((1, 8)), np.zeros((1, 4)))
    made = warp.in_room(features, warp.Room(0.0, (0.0,) * warp.CURVE_POINTS))
    np.testing.assert_allclose(made.envelope, two.reshape(1, -1), atol=1e-6)


def test_a_spliced_clip_has_the_words_that_its_frames_say(
    scripts: SimpleNamespace, folder: Path, tmp_path: Path
) -> None:
    """Guards against text of one place and codes of another, and against splices that are drawn for nothing."""
    clips = make_run(scripts, folder, tmp_path / "run").chains.clips.by_voice["v"]
    first, second = clips[:2]
    made = [scripts.chains.spliced(first, second, random.Random(seed)) for seed in range(9)]
    assert len({(len(clip.words), len(clip.codes)) for clip in made}) > 1
    for clip in made:
        assert len(clip.words) == len(clip.letters)
        num_words = len(clip.words)
        head = next(n for n in range(num_words) if clip.letters[n:] == second.letters[n - num_words :])
        tail = len(second.words) - (num_words - head)
        for source, moved, inside in ((first, 0, range(head)), (second, head - tail, range(head, num_words))):
            for word in inside:
                own, there = clip.places[:, 0] == word, source.places[:, 0] == word - moved
                np.testing.assert_array_equal(clip.codes[own], source.codes[there])
                np.testing.assert_array_equal(clip.features[0][own], source.features[0][there])
                assert clip.words[word] == source.words[word - moved]


def test_a_run_that_was_stopped_goes_on_exactly(scripts: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    whole = make_run(scripts, folder, tmp_path / "whole")
    losses = [whole.train_step() for _ in range(4)]
    first = make_run(scripts, folder, tmp_path / "parts")
    for _ in range(2):
        first.train_step()
    first.save()
    second = make_run(scripts, folder, tmp_path / "parts")
    assert second.step == 2
    made = torch.utils.data.DataLoader(scripts.train.Steps(second), batch_size=None)
    assert [second.train_step(batch) for batch, _ in zip(made, range(2), strict=False)] == losses[2:]
    second.save()
    whole.save()
    mine, other = (load_file(run.output / "state-4.safetensors") for run in (whole, second))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert [path.name for path in second.output.glob("*.safetensors")] == ["state-4.safetensors"]


def test_two_processes_take_the_step_of_one(scripts: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    """Guards against processes that all train on the same chains, or that drift apart."""
    parts = ("features", "codes", "codec", "tokenizer")
    options = [f"--{name}={folder / name}" for name in parts] + [f"--output={tmp_path / 'run'}", "--no-bf16"]
    options += ["--steps=1", "--chains=2", "--chain-positions=160", "--hidden=32", "--layers=5"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE / "train.py")]
    subprocess.run([sys.executable, *command, *options], check=True, timeout=240)
    one = make_run(scripts, folder, tmp_path / "one")
    one.arguments.steps = 1
    for index in range(2):
        batch, guided = one.chains.batch(0, [index])
        (scripts.model.total_loss(one.base.losses(batch, guided), 1.0) / 2).backward()
        one.positions += batch.num_tokens
    torch.nn.utils.clip_grad_norm_(one.base.parameters(), scripts.train.CLIP_NORM)
    for group in one.optimizer.param_groups:
        group["lr"] = one.learning_rate()
    one.optimizer.step()
    saved = load_file(tmp_path / "run" / "state-1.safetensors")
    for name, value in one.base.state_dict().items():
        torch.testing.assert_close(saved[f"base.{name}"], value, rtol=1e-5, atol=1e-6)
    state = json.loads((tmp_path / "run" / "state.json").read_text(encoding="utf-8"))
    assert state["positions"] == one.positions


def test_what_is_written_is_the_native_model(scripts: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    """Tables folded into the native weights; guidance and disturbed codes leave nothing behind."""
    run = make_run(scripts, folder, tmp_path / "run")
    made = run.chains.batch(0, range(2))
    first = run.train_step(made)
    for _ in range(9):
        last = run.train_step(made)
    assert last["codebook 0"] < first["codebook 0"]
    batch, _ = run.chains.batch(99, range(2))
    native = run.base.native()
    with torch.no_grad():
        audio_PD, text_PD = target_states(run.base.model.model, batch)
        found_PD, found_text_PD = target_states(native.model, batch)
        torch.testing.assert_close(found_PD, audio_PD, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found_text_PD, text_PD, rtol=1e-4, atol=1e-4)
        logits = run.base.model.audio_lm_head(audio_PD)
        torch.testing.assert_close(native.audio_lm_head(found_PD), logits, rtol=1e-4, atol=1e-4)
    untrained = make_run(scripts, folder, tmp_path / "other").base.native()
    assert not torch.equal(untrained.audio_lm_head.weight, native.audio_lm_head.weight)


def test_the_folder_that_is_written_is_a_base_of_the_family(
    scripts: SimpleNamespace, folder: Path, tmp_path: Path
) -> None:
    """It loads, reads text by its own tokenizer, and generates with the settings that it was measured with."""
    run = make_run(scripts, folder, tmp_path / "run")
    run.train_step()
    run.save()
    scripts.write_base.write_base(tmp_path / "run", folder / "codec", folder / "tokenizer", tmp_path / "base")
    family = family_on(tmp_path / "base" / "model", tmp_path / "base" / "codec")
    model: Any = family.load(FP32)
    assert model.generation_config.temperature == scripts.write_base.TEMPERATURE
    average = {name: value for name, value in run.average.items() if name == "model.model.norm.weight"}
    torch.testing.assert_close(model.model.norm.weight, average["model.model.norm.weight"], rtol=1e-3, atol=1e-3)
    sample = Sample("sample", "The cat sat.", None, (Clip(AudioRef(data=b"clip"), "A dog."),))
    codes_FK = np.zeros((5, 8), np.int16)
    (output,) = family.generate(model, [(sample, [codes_FK])], GenerationOptions(max_new_tokens=12))
    assert output.audio is not None and output.audio.sampling_rate == 16_000
