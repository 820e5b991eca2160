"""Speech from text and a reference clip, with the base, an adapter, or a merged model."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from speechtune.adapter import load_adapter
from speechtune.audio import file_name, write_wav
from speechtune.base_recipe import check_base, read_recipe
from speechtune.cache import encode_samples
from speechtune.config import RunConfig, build_config
from speechtune.errors import ConfigError
from speechtune.families import create_family, family_of
from speechtune.families.base import Family, GenerationOptions, Output, Sample
from speechtune.fingerprint import file_sha256
from speechtune.precision import PrecisionPlan, plan_precision
from speechtune.stored_adapter import adapter_folder, stored_base, weights_file

log = logging.getLogger("speechtune")


def model_config(model: str | None, codec: str | None, adapter: Path | None = None) -> RunConfig:
    """A configuration for using a model; the base defaults to the one the adapter names.

    Raises:
        ConfigError: neither a model nor an adapter that names one.
    """
    folder = adapter_folder(adapter) if adapter else None
    recipe = read_recipe(folder) if folder else None
    path = model or (stored_base(folder) if folder else None)
    if path is None:
        raise ConfigError("name the base with --model; there is no adapter that could name it")
    values: dict[str, Any] = {"path": path, "codec_path": codec}
    lora = {}
    if recipe:  # what the adapter was trained on, unless the caller says otherwise
        given = {name: value for name, value in values.items() if value is not None}
        replaced = {"path", "revision"} if model and model != recipe.model["path"] else set()
        values = {name: value for name, value in recipe.model.items() if name not in replaced} | given
        lora = {"trainable_tokens": recipe.trainable_tokens}
    return build_config({"family": family_of(path), "model": values, "lora": lora}, f"model {path}")


def load_model(config: RunConfig, adapter: Path | None, plan: PrecisionPlan | None = None) -> tuple[Family, nn.Module]:
    """Family and model in evaluation mode, the adapter on it where one is given.

    Raises:
        ConfigError: the base does not load.
        AdapterError: the adapter does not fit it.
    """
    plan = plan or plan_precision()
    family = create_family(config)
    model = family.load(plan)
    if adapter is not None:
        folder = adapter_folder(adapter)
        if recipe := read_recipe(folder):
            check_base(recipe, folder, family, model, plan)
        model = load_adapter(model, folder)
    return family, model.eval()


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
    """Generate for samples in batches; their own answers are not looked at."""
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


def provenance(config: RunConfig, adapter: Path | None) -> dict[str, Any]:
    """What a generated recording says of its origin, in its own file."""
    weights = None if adapter is None else file_sha256(weights_file(adapter_folder(adapter)))
    return {"generated": True, "model": config.model.path, "adapter_sha256": weights}


def write_outputs(
    outputs: Iterator[Output], directory: Path, origin: Mapping[str, Any] | None = None
) -> list[dict[str, object]]:
    """Write one wav per output and `outputs.jsonl`; an output that met the length cap is reported by name."""
    directory.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    with (directory / "outputs.jsonl").open("w", encoding="utf-8") as index:
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
