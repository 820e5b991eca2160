"""Speech from text and a reference clip, with the base, an adapter, or a merged model."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from speechtune.audio import file_name, write_wav
from speechtune.cache.encode import encode_samples
from speechtune.config import DataConfig, RunConfig
from speechtune.data.audio_checks import check_audio
from speechtune.errors import ManifestError
from speechtune.family import Family
from speechtune.lora.files import StoredAdapter
from speechtune.storage.lock import locked
from speechtune.types import GenerationOptions, Output, Sample

log = logging.getLogger("speechtune")


def check_references(samples: Sequence[Sample]) -> None:
    """Decode every reference once: from a silent or empty one a model makes up a voice.

    Raises ManifestError: those that cannot be used, by sample.
    """
    prompts = [replace(sample, audio=None, declared_seconds=(), borrows_reference=False) for sample in samples]
    found = check_audio(prompts, DataConfig(), deep=True).issues
    issues = [issue for issue in found if issue.code not in ("clipped", "too_long")]
    if issues:
        listed = "\n".join(f"  {issue}" for issue in issues)
        raise ManifestError(f"{len(issues)} reference(s) cannot be used\n{listed}", tuple(issues))


def answer(
    family: Family,
    model: nn.Module,
    samples: Sequence[Sample],
    options: GenerationOptions,
    cache_dir: Path,
    *,
    batch_size: int = 8,
    allow_urls: bool = False,
) -> Iterator[Output]:
    """Generate for samples in batches; a target that a sample carries is not used."""
    prompts = [family.prompt(sample) for sample in samples]
    encoded = encode_samples(family, prompts, cache_dir, allow_urls=allow_urls)
    started = time.monotonic()
    for first in range(0, len(prompts), batch_size):
        chosen = range(first, min(first + batch_size, len(prompts)))
        outputs = family.generate(model, [(prompts[i], encoded.features(i)) for i in chosen], options)
        done, seconds = chosen[-1] + 1, time.monotonic() - started
        left = seconds / done * (len(prompts) - done)
        log.info("%d/%d generated, %.2f a second, %.0f s left", done, len(prompts), done / seconds, left)
        yield from outputs


def provenance(config: RunConfig, adapter: StoredAdapter | None) -> dict[str, Any]:
    """The label of origin that is written into a generated recording."""
    weights, strength = (adapter.sha256["weights"], adapter.strength) if adapter else (None, None)
    return {"generated": True, "model": config.model.path, "adapter_sha256": weights, "adapter_strength": strength}


def write_outputs(
    outputs: Iterator[Output], directory: Path, origin: Mapping[str, Any] | None = None
) -> list[dict[str, object]]:
    """Write one wav per output and `outputs.jsonl`; an output that reached the length cap is reported by name."""
    rows: list[dict[str, object]] = []
    with locked(directory), (directory / "outputs.jsonl").open("w", encoding="utf-8") as index:
        for output in outputs:
            row = write_output(output, directory / f"{file_name(output.sample_id)}.wav", origin)
            index.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows.append(row)
    return rows


def write_output(output: Output, path: Path, origin: Mapping[str, Any] | None = None) -> dict[str, object]:
    """Write one output, with its origin in the file, and describe it."""
    seconds = 0.0
    if output.audio is not None:
        seconds = output.audio.duration_seconds
        write_wav(path, output.audio, origin or {"generated": True})
    if not output.stopped:
        log.warning("%s: no end of speech within %d rows: cut at the cap", output.sample_id, output.num_tokens)
    return {
        "id": output.sample_id,
        "audio": str(path),
        "seconds": round(seconds, 3),
        "rows": output.num_tokens,
        "stopped": output.stopped,
    }
