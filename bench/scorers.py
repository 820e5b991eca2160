"""What the offline scorers tell apart on the shipped human speech, and what they cost.

`python bench/scorers.py` prints a table and writes bench/results/scorers.json. `--clips` names clips.jsonl files to be
transcribed in place of the shipped one, `--asr` the recognisers. Times are ratios: of seconds computed to seconds of
audio, and of our call to the package's own in the same run, where that can be called.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from speechtune.audio import read_audio
from speechtune.config import DataConfig
from speechtune.data.speechocean import is_speechocean, read_speechocean
from speechtune.errors import ConfigError
from speechtune.tasks.voice_cloning.measures import cosine
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.tasks.voice_cloning.support import RATE
from speechtune.tasks.voice_cloning.word_errors import word_errors
from speechtune.types import Audio, AudioRef

SHIPPED = Path(str(files("speechtune"))) / "assets" / "demo-voices" / "clips.jsonl"
SNR_DB = (20, 5)
HALVED_SECONDS = 4.0
ADULT_YEARS = 18
CORPUS_CLIPS = 60


@dataclass(frozen=True)
class Spoken:
    """A recording and what is known of it."""

    audio: Audio
    speaker: str
    text: str
    language: str


def read_clips(path: Path) -> list[Spoken]:
    """Recordings at 16 kHz of a clips.jsonl, or of the first adults in the test split of a Speechocean762 folder."""
    if is_speechocean(path):
        read = read_speechocean(path, "test", DataConfig()).samples
        adults = [sample for sample in read if sample.pronunciation and (sample.pronunciation.age or 0) >= ADULT_YEARS][
            :CORPUS_CLIPS
        ]
        return [
            Spoken(read_audio(sample.audio, RATE), str(sample.speaker), sample.text, "en")
            for sample in adults
            if sample.audio is not None
        ]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Spoken(
            read_audio(AudioRef(str(path.parent / row["audio"])), RATE), row["speaker"], row["text"], row["language"]
        )
        for row in rows
    ]


def pieces_of(clips: Sequence[Spoken]) -> list[Spoken]:
    """The clips, those of over four seconds in halves: more pairs of one voice."""
    found = []
    for clip in clips:
        middle = len(clip.audio.samples) // 2 if clip.audio.duration_seconds >= HALVED_SECONDS else 0
        for samples in (clip.audio.samples[:middle], clip.audio.samples[middle:]):
            if len(samples):
                found.append(Spoken(Audio(samples, RATE), clip.speaker, clip.text, clip.language))
    return found


def with_noise(audio: Audio, snr_db: float, seed: int) -> Audio:
    """White noise added at a ratio of powers."""
    samples = audio.samples.astype(np.float64)
    noise = np.random.default_rng(seed).standard_normal(len(samples))
    noise *= math.sqrt(np.mean(samples**2) / np.mean(noise**2) / 10 ** (snr_db / 10))
    return Audio((samples + noise).astype(np.float32), RATE)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the seconds it takes."""
    started = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started


def beside(work: Callable[[], Any], peer: Callable[[], Any] | None, audios: Sequence[Audio]) -> tuple[Any, dict]:
    """What `work` gives; real-time factor, and where there is a peer the ratio of times and the largest difference."""
    found, own = timed(work)
    costs: dict[str, float] = {"real-time factor": own / sum(audio.duration_seconds for audio in audios)}
    if peer is not None:
        theirs, seconds = timed(peer)
        costs["time, ours / package's own call"] = own / seconds
        costs["greatest difference from it"] = float(np.abs(np.asarray(found) - np.asarray(theirs)).max())
    return found, costs


def speaker_figures(clips: Sequence[Spoken]) -> dict[str, float]:
    """Resemblyzer: mean similarity of pairs of one voice and of two, and the equal error rate."""
    encoder = load_scorers(None, "resemblyzer", None).speaker
    assert encoder is not None
    pieces = pieces_of(clips)
    audios = [piece.audio for piece in pieces]
    embedded, costs = beside(lambda: encoder.embed(audios), resemblyzer_peer(audios), audios)
    first, second = np.triu_indices(len(pieces), 1)
    sims = cosine(embedded[first], embedded[second])
    same = np.array([pieces[i].speaker == pieces[j].speaker for i, j in zip(first, second, strict=True)])
    thresholds = np.sort(sims)
    missed = np.searchsorted(np.sort(sims[same]), thresholds) / same.sum()
    taken = 1 - np.searchsorted(np.sort(sims[~same]), thresholds) / (~same).sum()
    at = int(np.abs(missed - taken).argmin())
    return {
        "pieces": len(pieces),
        "voices": len({piece.speaker for piece in pieces}),
        "similarity, same voice": float(sims[same].mean()),
        "similarity, two voices": float(sims[~same].mean()),
        "equal error rate": float((missed[at] + taken[at]) / 2),
    } | costs


def resemblyzer_peer(audios: Sequence[Audio]) -> Callable[[], Any] | None:
    """The package's own call, where librosa is installed for it."""
    try:
        import resemblyzer
        import resemblyzer.audio

        encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
        resemblyzer.preprocess_wav(audios[0].samples)  # librosa compiles on its first call
        encoder.embed_utterance(audios[0].samples)
    except ImportError:
        return None
    return lambda: [encoder.embed_utterance(resemblyzer.preprocess_wav(audio.samples)) for audio in audios]


def mos_figures(kind: str, clips: Sequence[Spoken]) -> dict[str, float]:
    """Mean score of clean speech and of the same speech with noise, and how often noise lowers it."""
    predictor = load_scorers(None, None, kind).mos
    assert predictor is not None
    pieces = pieces_of(clips)
    audios = [piece.audio for piece in pieces]
    clean, costs = beside(lambda: predictor.predict(audios), MOS_PEERS[kind](audios), audios)
    found = {"pieces": len(pieces), "MOS, clean": float(clean.mean())}
    for snr in SNR_DB:
        noisy = predictor.predict([with_noise(audio, snr, seed) for seed, audio in enumerate(audios)])
        found[f"MOS, noise at {snr} dB"] = float(noisy.mean())
        found[f"share of pieces lowered by noise at {snr} dB"] = float((noisy < clean).mean())
    return found | costs


def distillmos_peer(audios: Sequence[Audio]) -> Callable[[], Any]:
    """The package's own call; it is imported already, without torchaudio."""
    from distillmos import ConvTransformerSQAModel

    model = ConvTransformerSQAModel().eval()

    def call() -> list[float]:
        with torch.no_grad():
            return [model(torch.from_numpy(audio.samples)[None]).item() for audio in audios]

    return call


def dnsmos_peer(audios: Sequence[Audio]) -> Callable[[], Any] | None:
    """The package's own call, where librosa is installed for it."""
    try:
        from speechmos import dnsmos
    except ImportError:
        return None
    dnsmos.run(audios[0].samples, RATE)  # it loads its networks on its first call
    return lambda: [dnsmos.run(audio.samples, RATE)["ovrl_mos"] for audio in audios]


MOS_PEERS = {"distillmos": distillmos_peer, "dnsmos": dnsmos_peer}


def wer_figures(spec: str, clips: Sequence[Spoken]) -> dict[str, float]:
    """Corpus WER against the right texts and against those of other clips of the same language."""
    asr = load_scorers(spec, None, None).asr
    assert asr is not None
    known = [clip for clip in clips if asr.languages is None or clip.language in asr.languages]
    audios, languages = [clip.audio for clip in known], [clip.language for clip in known]
    transcripts, own = timed(lambda: asr.transcribe(audios, languages))
    others = {}
    for language in set(languages):
        own_places = [i for i, clip in enumerate(known) if clip.language == language]
        others |= dict(zip(own_places, own_places[1:] + own_places[:1], strict=True))

    def rate(text_of: Callable[[int], str]) -> float:
        counts = [word_errors(text_of(i), said, languages[i]) for i, said in enumerate(transcripts)]
        return sum(errors for errors, _ in counts) / sum(words for _, words in counts)

    peer = asr_peer(spec, audios, languages)
    same = (
        {}
        if peer is None
        else {"clips transcribed as by the library's own call": sum(map(str.__eq__, transcripts, peer))}
    )
    return same | {
        "clips": len(known),
        "WER, right texts": rate(lambda i: known[i].text),
        "WER, shuffled texts": rate(lambda i: known[others[i]].text),
        "real-time factor": own / sum(audio.duration_seconds for audio in audios),
    }


def asr_peer(spec: str, audios: Sequence[Audio], languages: Sequence[str]) -> list[str] | None:
    """What faster-whisper itself hears; None for the other recognisers."""
    kind, _, folder = spec.partition(":")
    if kind != "faster-whisper":
        return None
    from faster_whisper import WhisperModel

    model = WhisperModel(folder, device="cpu", compute_type="float32", local_files_only=True)
    found = []
    for audio, language in zip(audios, languages, strict=True):
        greedy: Any = {"beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False}
        segments, _ = model.transcribe(audio.samples, language=language, **greedy)
        found.append("".join(segment.text for segment in segments).strip())
    return found


def measure(clips: Sequence[Spoken], recognisers: Sequence[str]) -> dict[str, dict[str, float]]:
    """All figures by scorer; one that is not installed is reported with its install line and left out."""
    jobs: dict[str, Callable[[], dict[str, float]]] = {"resemblyzer": lambda: speaker_figures(clips)}
    jobs |= {kind: lambda kind=kind: mos_figures(kind, clips) for kind in MOS_PEERS}
    for spec in recognisers:
        kind, colon, place = spec.partition(":")
        jobs[f"{kind}{colon}{Path(place).name}"] = lambda spec=spec: wer_figures(spec, clips)
    found = {}
    for name, job in jobs.items():
        try:
            found[name] = job()
        except ConfigError as error:
            print(f"left out: {error}")
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--clips", type=Path, nargs="+", default=[SHIPPED], help="clips.jsonl files, Speechocean762 folders"
    )
    parser.add_argument("--asr", nargs="*", default=["pocketsphinx"], help="recognisers (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "scorers.json")
    options = parser.parse_args()
    clips = [clip for path in options.clips for clip in read_clips(path)]
    found = measure(clips, options.asr)
    table = Table("scorer", "figure", "value")
    for name, figures in found.items():
        for figure, value in figures.items():
            table.add_row(name, figure, f"{value:.4g}")
    Console().print(table)
    seconds = statistics.fmean(clip.audio.duration_seconds for clip in clips)
    data = {"clips": len(clips), "mean seconds": seconds, "threads": torch.get_num_threads()}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({"data": data} | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
