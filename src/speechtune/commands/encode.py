"""The verb `encode`: encode a recipe's clips into its cache, in one process, in shards, or on a Ray cluster."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speechtune.cache.encode import encode_samples
from speechtune.cache.encoded_set import EncodeReport
from speechtune.commands import print_result
from speechtune.config import RunConfig
from speechtune.errors import AudioError, ConfigError, ManifestError, SpeechtuneError
from speechtune.families import create_family, load_config
from speechtune.training.prepare import load_sets

log = logging.getLogger("speechtune")

_ERRORS = {kind.__name__: kind for kind in (ConfigError, ManifestError, AudioError)}


def run_encode(
    recipe: Path,
    overrides: Sequence[str],
    *,
    shard: str | None,
    engine: str,
    shards: int | None,
    verify: bool,
    as_json: bool,
) -> int:
    """Encode and print what was done; 0."""
    config = load_config(recipe, overrides)
    if engine == "ray":
        if shard is not None or verify:
            raise ConfigError("--engine ray makes all shards itself: leave out --shard, and --verify on its own first")
        encode_on_ray(config, shards)
    elif shards is not None:
        raise ConfigError("--shards goes with --engine ray; name this process's own share with --shard 0/4")
    parsed = None if shard is None else parse_shard(shard)
    report = encode_shard(config, parsed, verify=verify, quiet=as_json)
    values = asdict(report) | {"cache_dir": str(config.cache_dir)}
    lines = [f"{name}: {value}" for name, value in values.items() if name != "shards_left"]
    if parsed and not report.shards_left:
        lines.append(f"the set is complete: {report.num_clips} clips")
    elif parsed:
        left = [(f"{index}/{parsed[1]}", count) for index, count in sorted(report.shards_left.items())]
        lines += [f"shard {one} is not done: {count} clip(s) left; run it with --shard {one}" for one, count in left]
    return print_result(values, lines, as_json)


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4): the third of four shards; anything else raises `ConfigError`."""
    index, separator, count = text.partition("/")
    if not (separator and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard {text}: expected i/n with i from 0 to n-1, e.g. 0/4 to 3/4 for four processes")
    return int(index), int(count)


def encode_shard(
    config: RunConfig, shard: tuple[int, int] | None = None, *, verify: bool = False, quiet: bool = True
) -> EncodeReport:
    """Encode a recipe's training and evaluation data, or one shard of their clips."""
    family = create_family(config)
    samples = [sample for part in load_sets(config, family) for sample in part]
    settings = {"allow_urls": config.data.allow_urls, "verify": verify, "quiet": quiet}
    return encode_samples(family, samples, config.cache_dir, shard=shard, **settings).report


def encode_on_ray(config: RunConfig, num_shards: int | None = None) -> None:
    """Encode by the tasks of a Ray cluster: the one that RAY_ADDRESS names, else this machine.

    Every machine must see the data, the model and the cache under the same paths. `num_shards` is by default one per
    GPU, or per machine where there is none.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ConfigError(f"--engine ray: {error.name} is not installed: pip install 'speechtune[ray]'") from None
    owned = not ray.is_initialized()
    if owned:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
        gpus = int(sum(machine.get("GPU", 0) for machine in machines))
        # One shard gets all processors of a machine, because the codec encodes each clip in a thread of its own.
        needs = {"num_gpus": 1} if gpus else {"num_cpus": min(machine.get("CPU", 1) for machine in machines)}
        count = num_shards or gpus or len(machines)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        settings = {"values": config.model_dump(mode="json"), "count": count, "folder": os.getcwd()}
        rows = ray.data.range(count, override_num_blocks=count).map(_encode_row, fn_kwargs=settings, **needs)
        for done, row in enumerate(rows.iter_rows(), 1):
            if row["error"]:
                kind = _ERRORS.get(row["kind"], SpeechtuneError)
                raise kind(f"shard {row['shard']}/{count}: {row['error']}")
            log.info(
                "shard %d/%d: %d clips encoded in %.0f s; %d of %d shards done",
                *(row["shard"], count, row["encoded"], row["seconds"], done, count),
            )
    except ray.exceptions.RayError as error:
        raise ConfigError(f"--engine ray: a task died: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if owned:
            ray.shutdown()


def _encode_row(row: dict[str, Any], values: dict[str, Any], count: int, folder: str) -> dict[str, Any]:
    """Encode one shard in a Ray task; errors are returned, because Ray would wrap a raised one in its own."""
    os.chdir(folder)  # relative paths of the recipe start at the folder in which the verb was called
    shard = int(row["id"])
    result = {"shard": shard, "encoded": 0, "seconds": 0.0, "kind": "", "error": ""}
    try:
        report = encode_shard(RunConfig.model_validate(values), (shard, count))
    except SpeechtuneError as error:
        return result | {"kind": type(error).__name__, "error": str(error)}
    return result | {"encoded": report.num_encoded, "seconds": report.seconds}
