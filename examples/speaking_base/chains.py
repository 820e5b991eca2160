"""Training batches: chains of clips of one voice, each clip predicted from those before it.

A chain is a prompt of Higgs Audio v2 with references (`layout.render_prompt`); unlike there, every clip in it is a
target. It is a function of the seed, the step and the list of shards.

Shapes: S positions, R audio rows, K codebooks, F frames of a clip, G guided rows.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features import NAMES, read_features
from transformers import PreTrainedTokenizerFast
from warp import Room, Warp, in_room, random_room, random_warp, warped

from speechtune.families.higgs_audio_v2.codec_world import Features, WorldCodec
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.higgs_audio_v2.layout import AUDIO, delay_rows, render_prompt, target_arrays
from speechtune.types import AudioRef, Batch, Encoded, Sample

SPELT_SHARE = 0.04  # of words given as letters
NEIGHBOUR_SHARE, RANDOM_SHARE = 0.12, 0.03  # of input codes that are replaced: a model must live with its own errors
DEVELOPMENT_EVERY = 100  # clips
MOST_HEARD = "af_heart"
OTHERS_SHARE, PLAIN_SHARE = 0.5, 0.5
ROOM_SHARE, ROOM_DECIBELS = 0.4, (-50.0, -20.0)
SPLICED_SHARE = 0.5  # of the clips of all voices but the first
COUNT_POWER = 0.5  # voices are drawn by their number of clips to this power: rare ones often, not by heart


@dataclass(frozen=True)
class Spoken:
    """A clip.

    Attributes:
        words: token ids of each word, phonemes as far as the tokenizer knows it.
        letters: token ids of each word as letters.
        codes: (F, K).
        features: what the codes are of, as they are stored.
        places: (F, 3), the word that each frame belongs to, and which of how many of its symbols.
    """

    words: list[list[int]]
    letters: list[list[int]]
    codes: np.ndarray
    places: np.ndarray
    features: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Guided:
    """Where the rows of a batch should look.

    Attributes:
        rows, looked_at: positions (G,) in the flattened batch.
        token, next_token: ids (G,) of what is there, and behind it.
        counts: rows of each chain.
    """

    rows: torch.Tensor
    looked_at: torch.Tensor
    token: torch.Tensor
    next_token: torch.Tensor
    counts: tuple[int, ...]

    def to(self, device: torch.device | str) -> "Guided":
        """The same with its tensors on `device`."""
        tensors = (self.rows, self.looked_at, self.token, self.next_token)
        return Guided(*(tensor.to(device) for tensor in tensors), counts=self.counts)


class Clips:
    """All clips of some shards, by voice."""

    def __init__(self, codes: Path, features: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Read the shards of a folder, and what they were made of in shards of the same names in another."""
        self.tokenizer = tokenizer
        self.space = self.ids(" ")[0]
        self.by_voice: dict[str, list[Spoken]] = {}
        self.development: dict[str, list[Spoken]] = {}
        self.count = 0
        for shard in sorted(codes.glob("*.npz")):
            known = stored_features(features / shard.name)
            for row, codes_FK, places in read_codes(shard):
                if row["split"] == "train":
                    clip = self._clip(row, codes_FK, places, known[row["name"]])
                    group = self.by_voice if self.count % DEVELOPMENT_EVERY else self.development
                    group.setdefault(row["voice"], []).append(clip)
                    self.count += 1
        self.by_voice = {voice: clips for voice, clips in self.by_voice.items() if len(clips) > 3}
        self.others = sorted(self.by_voice.keys() - {MOST_HEARD})
        self.weights = [len(self.by_voice[voice]) ** COUNT_POWER for voice in self.others]

    def ids(self, text: str) -> list[int]:
        """Token ids."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _clip(
        self, row: dict[str, Any], codes: np.ndarray, places: np.ndarray, features: tuple[np.ndarray, ...]
    ) -> Spoken:
        words: list[list[int]] = [[]]
        for token in self.ids(row["text"]):
            if token == self.space:
                words.append([])
            else:
                words[-1].append(token)
        known = {token: self.tokenizer.convert_tokens_to_ids(token) for token in set(row["text"].lower())}
        letters = [[known[letter] for letter in word] for word in row["text"].lower().split()]
        return Spoken(words, letters, codes, places, features)

    def draw_voice(self, draw: random.Random) -> tuple[str, Warp | None, Room | None]:
        """A voice, often the one with most clips; as often as not what makes another of it; at times noise."""
        others = MOST_HEARD not in self.by_voice or draw.random() < OTHERS_SHARE
        voice = draw.choices(self.others, self.weights)[0] if others else MOST_HEARD
        warp = None if draw.random() < PLAIN_SHARE else random_warp(draw)
        return voice, warp, random_room(draw, *ROOM_DECIBELS) if draw.random() < ROOM_SHARE else None


def stored_features(path: Path) -> dict[str, tuple[np.ndarray, ...]]:
    """Features of a shard's clips by their names, as they are stored."""
    kept = ((row["name"], features) for row, features, _ in read_features(path))
    return {name: tuple(getattr(features, part).astype(np.float16) for part in NAMES) for name, features in kept}


def read_codes(path: Path) -> list[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Row, codes and places of each clip of a shard."""
    with np.load(path, allow_pickle=False) as shard:
        rows, codes, places = json.loads(shard["rows"].tobytes()), shard["codes"], shard["places"]
    ends = np.cumsum([row["frames"] for row in rows])[:-1]
    return list(zip(rows, np.split(codes, ends), np.split(places, ends), strict=True))


class Chains:
    """Makes batches of chains."""

    def __init__(
        self,
        family: HiggsAudioV2Family,
        clips: Clips,
        codec: WorldCodec,
        neighbours: Sequence[np.ndarray],
        seed: int,
        most_positions: int,
    ) -> None:
        """
        Args:
            family: collates, and knows the model's ids.
            clips: what chains are made of.
            codec: makes the codes of other voices.
            neighbours: of each codebook the nearest other entries of each entry, (V, 3).
            seed: of all draws.
            most_positions: chains end before they are longer.
        """
        self.family, self.clips, self.codec, self.neighbours = family, clips, codec, neighbours
        self.seed, self.most_positions = seed, most_positions
        blank = Sample("", "\0", AudioRef(data=b"x"))
        self.head, self.between, self.tail = (
            clips.ids(part) for part in re.split(f"\0|{re.escape(AUDIO)}", render_prompt(blank, with_target=True))
        )
        header = clips.ids("<|start_header_id|>user<|end_header_id|>")
        self.first, self.turn = self.head[: -len(header)], header

    def batch(self, step: int, indices: Sequence[int]) -> tuple[Batch, Guided]:
        """These chains of a step's."""
        chains = []
        for index in indices:
            draw = random.Random(f"{self.seed} {step} {index}")
            voice, warp, room = self.clips.draw_voice(draw)
            clips = self.clips.by_voice[voice]
            chosen = draw.sample(clips, min(len(clips), 12))
            if voice != MOST_HEARD:
                chosen = [spliced(c, draw.choice(clips), draw) if draw.random() < SPLICED_SHARE else c for c in chosen]
            chains.append(self.chain(chosen, draw, np.random.default_rng([self.seed, step, index]), warp, room))
        return self.collate(chains)

    def development_batch(self, most: int) -> tuple[Batch, Guided]:
        """Clips that no chain of training holds, each behind one of its voice that is known."""
        draw, noise = random.Random(self.seed), None
        voices = sorted(voice for voice in self.clips.development if voice in self.clips.by_voice)
        pairs = [(self.clips.by_voice[v][0], clip) for v in voices for clip in self.clips.development[v]][:most]
        return self.collate([self.chain(pair, draw, noise) for pair in pairs])

    def collate(self, chains: Sequence[tuple[Encoded, np.ndarray]]) -> tuple[Batch, Guided]:
        """Chains end to end."""
        batch = self.family.collate([encoded for encoded, _ in chains])
        starts = np.cumsum([0, *(encoded.num_tokens for encoded, _ in chains)])[:-1]
        offsets = [np.array([[start], [start], [0], [0]]) for start in starts]
        guided = np.concatenate([g + offset for (_, g), offset in zip(chains, offsets, strict=True)], axis=1)
        return batch, Guided(*torch.from_numpy(guided), counts=tuple(len(g[0]) for _, g in chains))

    def chain(
        self,
        clips: Sequence[Spoken],
        draw: random.Random,
        noise: np.random.Generator | None,
        warp: Warp | None = None,
        room: Room | None = None,
    ) -> tuple[Encoded, np.ndarray]:
        """Clips of a voice in a row, as many as fit, and what guides their rows, (4, G).

        `warp` makes another voice, `room` adds noise.
        """
        config = self.family.model_config
        ids, rows, parts, guides = list(self.first), [], [], []
        for clip in clips:
            spelt = [noise is not None and draw.random() < SPELT_SHARE for _ in clip.words]
            words = [b if s and b else a for a, b, s in zip(clip.words, clip.letters, spelt, strict=True)]
            tokens = [token for word in words for token in (*word, self.clips.space)][:-1]
            codes_FK = clip.codes
            if warp or room:
                features = Features(*(part.astype(np.float64) for part in clip.features))
                features = warped(features, warp) if warp else features
                codes_FK = self.codec.quantise(in_room(features, room) if room else features)
            rows_RK = delay_rows(codes_FK, config.audio_stream_bos_id, config.audio_stream_eos_id)
            fillers = config.num_codebooks - 1
            held = [config.audio_token_id] * (len(rows_RK) - fillers) + [config.audio_delay_token_id] * fillers
            asked = [*self.turn, *tokens, *self.between]
            if len(ids) + len(asked) + len(held) + len(self.tail) > self.most_positions and parts:
                break
            text_start, row_start = len(ids) + len(self.turn), len(ids) + len(asked)
            ids += [*asked, *held, *self.tail]
            parts.append(target_arrays(np.asarray(ids, np.int32), rows_RK, len(codes_FK), len(self.tail)))
            rows.append(rows_RK if noise is None else self.disturbed(rows_RK, noise))
            guides.append(_guide(clip.places, words, tokens, self.clips.space, text_start, row_start))
        arrays = {"input_ids": np.asarray(ids, np.int32), "audio_rows": np.concatenate(rows).astype(np.int16)}
        for name in ("audio_positions", "audio_targets", "text_positions", "text_targets"):
            arrays[name] = np.concatenate([part[name] for part in parts])
        seconds = sum(len(clip.places) for clip in clips[: len(parts)]) / 25
        return Encoded("chain", arrays, len(ids), seconds), np.concatenate(guides, axis=1)

    def disturbed(self, rows_RK: np.ndarray, noise: np.random.Generator) -> np.ndarray:
        """Rows with some codes replaced, by near ones or by any."""
        changed_RK = rows_RK.copy()
        for k, neighbours_V3 in enumerate(self.neighbours):
            column_R = changed_RK[:, k]
            codes_R, draws_R = column_R < len(neighbours_V3), noise.random(len(column_R))
            near_R, any_R = codes_R & (draws_R < NEIGHBOUR_SHARE), codes_R & (draws_R > 1 - RANDOM_SHARE)
            which = noise.integers(neighbours_V3.shape[1], size=near_R.sum())
            column_R[near_R] = neighbours_V3[column_R[near_R], which]
            column_R[any_R] = noise.integers(len(neighbours_V3), size=any_R.sum())
        return changed_RK


def spliced(first: Spoken, second: Spoken, draw: random.Random) -> Spoken:
    """The beginning of a clip and the end of another, of words, the cuts anywhere between them.

    A voice of which there are few clips is not learnt with its sentences by heart: what comes next has to be read.
    """
    if min(len(first.words), len(second.words)) < 2:
        return first
    head, tail = (draw.randint(1, len(clip.words) - 1) for clip in (first, second))
    end, start = np.searchsorted(first.places[:, 0], head), np.searchsorted(second.places[:, 0], tail)
    moved_F3 = second.places[start:] + np.array([head - tail, 0, 0], second.places.dtype)

    def joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([a[:end], b[start:]])

    return Spoken(
        first.words[:head] + second.words[tail:],
        first.letters[:head] + second.letters[tail:],
        joined(first.codes, second.codes),
        np.concatenate([first.places[:end], moved_F3]),
        tuple(joined(a, b) for a, b in zip(first.features, second.features, strict=True)),
    )


def _guide(
    places_F3: np.ndarray, words: Sequence[list[int]], tokens: list[int], space: int, text_start: int, row_start: int
) -> np.ndarray:
    """What row t looks at while it predicts frame t: (position, looked at, token, next token) by frame, (4, F)."""
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    word_F, symbol_F, symbols_F = places_F3.T.astype(np.int64)
    lengths_F = np.asarray([len(word) for word in words])[word_F]
    inside_F = np.where(symbols_F == 0, lengths_F, symbol_F * lengths_F // np.maximum(symbols_F, 1))
    token_F = np.minimum(starts[word_F] + inside_F, len(tokens) - 1)
    ids = np.asarray([*tokens, space])
    rows_F = row_start + np.arange(len(places_F3))
    return np.stack([rows_F, text_start + token_F, ids[token_F], ids[token_F + 1]])
