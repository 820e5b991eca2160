"""A long text, spoken by the base that ships behind the server: all of its words in their order, without a gap."""

import asyncio
import os
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import psutil
import pytest
from hearing import HERE, RECORDED_TEXT

from speechtune.families.higgs_audio_v2.tiny import speaking_base
from speechtune.family import Scorers
from speechtune.inference.adapter_set import AdapterSet
from speechtune.inference.sentences import cut_text
from speechtune.serving.service import Limits, Service
from speechtune.serving.voices import Voice
from speechtune.tasks.voice_cloning.word_errors import word_errors
from speechtune.types import Audio, GenerationOptions

NUM_CHARACTERS = 3000
MOST_WER = 0.3  # measured: 0.004
LEAST_IN_ORDER = 0.7  # measured: 0.993
MOST_GAP_SECONDS = 1.0  # measured: 0.2
MOST_GROWTH = 20 * 2**20  # bytes, over the last three quarters; measured: 2.1 MiB


async def speak(service: Service, pieces: list[str]) -> tuple[list[Audio], list[int]]:
    """The audio of each piece, and the memory of this process after it."""
    await service.start()
    recording = (HERE / "voices" / "af_heart.flac").read_bytes()
    await service.add_voice(Voice(name="heart", text=RECORDED_TEXT, audio=b"").model_copy(update={"audio": recording}))
    audios, memory = [], []
    async for output in service.speak(pieces, service.choose("base", "heart"), GenerationOptions(seed=0)):
        assert output.audio is not None
        audios.append(output.audio)
        memory.append(psutil.Process(os.getpid()).memory_info().rss)
    await service.close()
    return audios, memory


def longest_gap(samples: np.ndarray, rate: int) -> float:
    """Seconds of the longest stretch whose 20 ms all stay 40 dB below the loudest."""
    size = rate // 50
    levels = np.sqrt(np.square(samples[: len(samples) // size * size].reshape(-1, size)).mean(1))
    longest = run = 0
    for silent in levels < 0.01 * levels.max():
        run = run + 1 if silent else 0
        longest = max(longest, run)
    return longest / 50


@pytest.mark.slow
def test_three_thousand_characters(ears: Scorers, tmp_path: Path) -> None:
    sentences = (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()
    text = ""
    while len(text) < NUM_CHARACTERS:
        text += f" {sentences[text.count('.') % len(sentences)]}"
    pieces = cut_text(text)

    async def run() -> tuple[list[Audio], list[int]]:
        base = speaking_base()
        limits = Limits(batch_size=16, max_new_tokens=160)
        return await speak(Service(AdapterSet(base.pop("path"), base), tmp_path, limits), pieces)

    audios, memory = asyncio.run(run())
    assert len(audios) == len(pieces) > 40
    rate = audios[0].sampling_rate
    gap = longest_gap(np.concatenate([audio.samples for audio in audios]), rate)
    assert ears.asr is not None
    heard = ears.asr.transcribe(audios, ["en"] * len(audios))
    found = [word_errors(said, text_of, "en") for said, text_of in zip(pieces, heard, strict=True)]
    wer = sum(errors for errors, _ in found) / sum(words for _, words in found)
    said, spoken = " ".join(pieces).lower().split(), " ".join(heard).lower().split()
    in_order = sum(block.size for block in SequenceMatcher(None, said, spoken, autojunk=False).get_matching_blocks())
    growth = memory[-1] - memory[len(memory) // 4]
    print(f"wer {wer:.3f}, in order {in_order / len(said):.3f}, gap {gap:.2f} s, growth {growth / 2**20:.1f} MiB")
    assert wer < MOST_WER and in_order / len(said) > LEAST_IN_ORDER
    assert gap < MOST_GAP_SECONDS
    assert growth < MOST_GROWTH
