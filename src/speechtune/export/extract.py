"""Extract a LoRA adapter from a full checkpoint: tensors by name, configuration from shapes and files nearby."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig

from speechtune.errors import AdapterError
from speechtune.export.verify import Verification, verify_adapter
from speechtune.families import adapter_layouts
from speechtune.lora.files import (
    BIN_NAME,
    CONFIG_NAME,
    FOLDER_NAME,
    KEY_PREFIX,
    WEIGHTS_NAME,
    in_checkpoint,
    layout_of,
    read_tensors,
    write_adapter,
)
from speechtune.storage.verified_folder import STATE_NAME, write_verified

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
NOT_WEIGHTS = re.compile(r"optimizer|scheduler|rng_state|scaler|training_args")
TRAINED, EVERYTHING = re.compile(r"lora_|\.modules_to_save\.|\.trainable_tokens_"), re.compile("")
WRAPPER_PARTS = re.compile(r"(^|(?<=\.))(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
    r"(?:\.(?P<leaf>weight|bias))?"
)
SAVED_KEY = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>.+)")
RUN_FILES = (CONFIG_NAME, "config.yaml", "training_args.json", "args.json", "trainer_config.json", "hparams.json")
RUN_FILES += (STATE_NAME,)
BASE_NAMES = ("base_model_name_or_path", "base_model_path", "model_path", "model_name_or_path")


@dataclass(slots=True)
class Weights:
    """LoRA tensors under the names they have in an adapter's file, and what follows from their old names."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    saved_modules: set[str] = field(default_factory=set)
    adapter_names: set[str] = field(default_factory=set)
    dora: bool = False
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What one file near a checkpoint holds of a run's settings; None where it does not name one."""

    file: Path
    alpha: float | None = None
    rank: int | None = None
    base: str | None = None
    codec: str | None = None
    rslora: bool | None = None
    alpha_pattern: Mapping[str, float] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was extracted, where alpha and base come from, and what could not be known."""

    output: str
    tensors: int
    modules: int
    rank: int
    rank_pattern: Mapping[str, int]
    alpha: float
    alpha_from: str
    base: str | None
    base_from: str
    layout: str | None
    unknown: tuple[str, ...]
    verification: Verification


def extract(
    checkpoint: Path,
    output: Path,
    *,
    alpha: float | None = None,
    base: str | None = None,
    rslora: bool | None = None,
    adapter_name: str | None = None,
) -> ExtractReport:
    """Publish the LoRA tensors of a full checkpoint as a PEFT folder, verified before it appears.

    Args:
        checkpoint: a weights file, or a folder of safetensors or .bin files, sharded or not.
        output: a folder that does not exist yet.
        alpha: lora_alpha of the training; None looks for it in the files near the checkpoint.
        base: hub id or folder of the base; None looks for it there too.
        rslora: whether the training scaled by sqrt(rank); None looks for it there too.
        adapter_name: which adapter, where the checkpoint holds several.

    Raises AdapterError: no LoRA tensors, damaged or incomplete files, several adapters, or no file gives alpha;
    CheckpointError: the output exists or cannot be written.
    """
    checkpoint = _named_folder(in_checkpoint(checkpoint), adapter_name)
    weights = read_lora(checkpoint, adapter_name)
    if not weights.ranks:
        raise AdapterError(f"{checkpoint}: no lora_A in any of its weights; there is no adapter to extract")
    rank = Counter(weights.ranks.values()).most_common(1)[0][0]
    levels = settings_nearby(checkpoint)
    alpha_value, alpha_from, source = _find_alpha(checkpoint, levels, alpha, rank)
    bases = ((settings.base, str(settings.file)) for level in levels for settings in level if settings.base)
    base_value, base_from = (base, "--base") if base else next(bases, (None, "unknown"))
    scaled = rslora if rslora is not None else source.rslora if source else None
    config = _config(checkpoint, weights, rank, source)
    config.lora_alpha = alpha_value  # pyright: ignore[reportAttributeAccessIssue]  # PEFT divides by it; a float is fine
    config.base_model_name_or_path, config.use_rslora = base_value, bool(scaled)
    verified: list[Verification] = []

    def write(aside: Path) -> None:
        write_adapter(aside, config, weights.tensors)
        verified.append(replace(verify_adapter(aside, any_layout=True), path=str(output)))
        if verified[0].issues:
            raise AdapterError(f"{checkpoint}: what was extracted does not verify: " + "; ".join(verified[0].issues))

    write_verified(output, write, weights.tensors)
    return ExtractReport(
        str(output),
        len(weights.tensors),
        len(weights.ranks),
        rank,
        config.rank_pattern or {},
        alpha_value,
        alpha_from,
        base_value,
        base_from,
        layout_of(weights.tensors, adapter_layouts()),
        tuple(_unknown(base_value, scaled, alpha, source)),
        verified[0],
    )


def _config(checkpoint: Path, weights: Weights, rank: int, source: Settings | None) -> LoraConfig:
    """What the tensors alone give of an adapter's configuration, and a file's alpha by module."""
    try:
        return LoraConfig(
            r=rank,
            rank_pattern={module: own for module, own in weights.ranks.items() if own != rank},
            alpha_pattern=dict(source.alpha_pattern or {}) if source else {},
            target_modules=sorted(weights.ranks),  # exactly the modules that have weights
            modules_to_save=sorted(weights.saved_modules) or None,
            use_dora=weights.dora,
            lora_bias=weights.bias,
            inference_mode=True,
        )
    except ValueError as error:
        raise AdapterError(f"{checkpoint}: PEFT knows no adapter with these parts: {error}") from None


def _unknown(base: str | None, rslora: bool | None, alpha: float | None, source: Settings | None) -> Iterator[str]:
    yield "dropout and initialisation of the training: default values; loading does not need them"
    if base is None:
        yield "the base: no file near the checkpoint names it; give --base"
    if rslora is None:
        yield "use_rslora: taken as false; if the run scaled by sqrt(rank), give --rslora"
    if alpha is not None and source and source.alpha != alpha:
        yield f"whether alpha is {alpha:g} as given or {source.alpha:g} as {source.file} says; given was written"


def read_lora(checkpoint: Path, adapter_name: str | None = None) -> Weights:
    """Collect the LoRA tensors of a checkpoint, one file at a time, under the names of an adapter's file."""
    weights = Weights()
    for file in weight_files(checkpoint):
        wanted = EVERYTHING if file.name in (WEIGHTS_NAME, BIN_NAME) else TRAINED  # the adapter's own file has no base
        for key, tensor in read_tensors(file, lambda name, wanted=wanted: bool(wanted.search(name))).items():
            if not _take(weights, key, tensor, adapter_name):
                raise AdapterError(
                    f"{file}: {key} is trained, but no LoRA tensor: it cannot be extracted by its name alone"
                )
    _choose(checkpoint, weights.adapter_names, adapter_name)
    return weights


def _choose(checkpoint: Path, names: Collection[str], wanted: str | None) -> None:
    """Refuse several adapters of which none is named, and a name that none of them has."""
    listed = ", ".join(sorted(names))
    if wanted is None and len(names) > 1:
        raise AdapterError(f"{checkpoint}: it holds several adapters ({listed}); choose one with --adapter-name")
    if wanted is not None and names and wanted not in names:
        raise AdapterError(f"{checkpoint}: no adapter {wanted!r} in it; --adapter-name can be: {listed}")


def _named_folder(checkpoint: Path, adapter_name: str | None) -> Path:
    """The folder of a named adapter: PEFT writes each but "default" into one of its own, beside that one's files."""
    folders = {file.parent.name: file.parent for file in checkpoint.glob(f"*/{CONFIG_NAME}")}
    folders.pop(FOLDER_NAME, None)  # a copy of what lies in the checkpoint itself
    if folders and (checkpoint / CONFIG_NAME).is_file():
        folders["default"] = checkpoint
    elif adapter_name not in folders and any(file.suffix in WEIGHT_SUFFIXES for file in checkpoint.glob("*")):
        return checkpoint
    _choose(checkpoint, folders, adapter_name)
    return folders.get(adapter_name or next(iter(folders), ""), checkpoint)


def _take(weights: Weights, key: str, tensor: torch.Tensor, adapter_name: str | None) -> bool:
    """Take a tensor over under its new name, unless it is of another adapter; False where its name tells nothing."""
    clean = WRAPPER_PARTS.sub("", key)
    _, has_prefix, after = clean.partition(KEY_PREFIX)
    match = LORA_KEY.fullmatch(clean) or SAVED_KEY.fullmatch(clean)
    if match is None:
        return False
    adapter = match["adapter"]
    if adapter is not None:
        weights.adapter_names.add(adapter)
    if len(weights.adapter_names) > 1 and adapter_name is None:
        return True  # refused at the end, when all names are known
    if adapter_name is not None and adapter is not None and adapter != adapter_name:
        return True
    while after.startswith(KEY_PREFIX):  # get_peft_model was applied twice
        after = after.removeprefix(KEY_PREFIX)
    inside = after if has_prefix else re.sub(r"^(module\.)+", "", clean)  # without PEFT's prefix only DDP's is known
    module = inside[: len(inside) - len(clean) + match.end("module")]
    if "part" not in match.groupdict():
        weights.saved_modules.add(module)
        name = f"{KEY_PREFIX}{module}.{match['leaf']}"
    else:
        part, leaf = match["part"], match["leaf"]
        weights.dora |= part == "lora_magnitude_vector"
        weights.bias |= leaf == "bias"
        plain = part == "lora_magnitude_vector" or "embedding" in part
        name = f"{KEY_PREFIX}{module}.{part}" + ("" if plain or leaf is None else f".{leaf}")
        if part in ("lora_A", "lora_embedding_A"):
            weights.ranks[module] = tensor.shape[0]
    if name in weights.tensors and not torch.equal(weights.tensors[name], tensor):
        raise AdapterError(f"two different tensors claim the name {name}; the second is {key}")
    weights.tensors[name] = tensor
    return True


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: those an index names, else safetensors, else torch files."""
    if checkpoint.is_file():
        return [checkpoint]
    for index in sorted(checkpoint.glob("*.index.json"), key=lambda path: ".safetensors" not in path.name):
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise AdapterError(f"{index}: not readable as an index of shards: {error}") from None
        if missing := [name for name in names if Path(name).name != name or not (checkpoint / name).is_file()]:
            raise AdapterError(f"{index}: {len(missing)} of its {len(names)} files are not there: {missing[:3]}")
        return [checkpoint / name for name in names]
    candidates = [path for path in sorted(checkpoint.glob("*")) if path.is_file() and path.suffix in WEIGHT_SUFFIXES]
    files = [path for path in candidates if not NOT_WEIGHTS.search(path.name)]
    if not files:
        raise AdapterError(f"{checkpoint}: no weights there (*{', *'.join(WEIGHT_SUFFIXES)})")
    return [path for path in files if path.suffix == ".safetensors"] or files


def settings_nearby(checkpoint: Path) -> list[list[Settings]]:
    """Settings of the run: from files in the checkpoint's folder, then from those in its parent, nearest first."""
    folder = (checkpoint.parent if checkpoint.is_file() else checkpoint).absolute()
    levels = [[folder, folder / FOLDER_NAME], [folder.parent, folder.parent / FOLDER_NAME]]
    return [[settings for place in places for settings in _settings_in(place)] for places in levels]


def _settings_in(folder: Path) -> Iterator[Settings]:
    for name in RUN_FILES:
        file = folder / name
        try:
            values = (yaml.safe_load if file.suffix == ".yaml" else json.loads)(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(values, dict):
            yield _settings(file, values)


def _settings(file: Path, values: Mapping[str, Any]) -> Settings:
    lora, model = values.get("lora"), values.get("model")
    if isinstance(lora, dict) and isinstance(model, dict):  # our own recipe
        lora = lora if lora.get("enabled", True) else {}
        base, codec = model.get("path"), model.get("codec_path")
        return Settings(file, lora.get("alpha"), lora.get("rank"), base, codec, lora.get("rslora"))
    flat = _flat(values)
    base = next((flat[name] for name in BASE_NAMES if isinstance(flat.get(name), str)), None)
    rank = next((flat[name] for name in ("r", "lora_rank", "lora_r") if isinstance(flat.get(name), int)), None)
    alpha = flat.get("lora_alpha")
    alpha = float(alpha) if isinstance(alpha, int | float) else None
    codec = flat.get("audio_tokenizer_path")
    return Settings(file, alpha, rank, base, codec, flat.get("use_rslora"), flat.get("alpha_pattern"))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    inner = [_flat(part) for part in values.values() if isinstance(part, dict)]
    return {key: value for part in [*inner, values] for key, value in part.items()}


def _find_alpha(
    checkpoint: Path, levels: list[list[Settings]], given: float | None, rank: int
) -> tuple[float, str, Settings | None]:
    """Alpha, where it comes from, and the settings it stands in: the given one, or that of the nearest fitting file."""
    other_ranks = []
    for level in levels:
        alphas = {settings: settings.alpha for settings in level if settings.alpha is not None}
        fitting = {settings: alpha for settings, alpha in alphas.items() if settings.rank in (None, rank)}
        other_ranks += [f"{settings.file} says rank {settings.rank}" for settings in alphas if settings not in fitting]
        if given is None and len(set(fitting.values())) > 1:
            listed = ", ".join(f"{settings.file} says {alpha:g}" for settings, alpha in fitting.items())
            raise AdapterError(f"{checkpoint}: files disagree on lora_alpha: {listed}; give it with --alpha")
        if fitting:
            settings, alpha = next(iter(fitting.items()))
            if given is None:
                return alpha, str(settings.file), settings
            return given, "--alpha", replace(settings, alpha_pattern=None)  # it scales by another alpha than the given
    if given is not None:
        return given, "--alpha", None
    why = f" ({'; '.join(other_ranks)}, the weights have rank {rank})" if other_ranks else ""
    raise AdapterError(
        f"{checkpoint}: lora_alpha is not in the weights, and no file in or beside the folder gives it{why}; give the "
        "value of the training with --alpha (the original pipeline's default was 32)"
    )
