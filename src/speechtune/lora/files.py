"""Saved adapters: their files read without running code, and checked for what no base could make good."""

import copy
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from speechtune.errors import AdapterError, Issue
from speechtune.family import NATIVE, AdapterLayout
from speechtune.lora.base_identity import BaseRecipe, read_recipe
from speechtune.storage.files import file_sha256
from speechtune.storage.model_folder import not_downloaded
from speechtune.storage.verified_folder import MANIFEST_NAME, verify_folder

FOLDER_NAME = "lora_adapters"
WEIGHTS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"
EXTRACT = "`speechtune adapters extract PATH OUTPUT`"
KEY_PREFIX = "base_model.model."
LORA_PART = re.compile(r"\.lora_(embedding_)?([AB]|magnitude_vector)\b")
PEFT_KEY = re.compile(  # of a LoRA tensor, as PEFT writes it: no wrapper's name and no adapter's name inside
    r"base_model\.model\.(?!base_model\.|module\.)(?:(?!_orig_mod|_fsdp_wrapped|_checkpoint_wrapped)[^.]+\.)+"
    r"lora_(?:[AB]\.(?:weight|bias)|embedding_[AB]|magnitude_vector(?:\.weight)?)"
)
ODD_KEY = f"keys like {{}}, which PEFT does not write: {EXTRACT} brings them into its form"
OTHER_TARGETS = f"if its target_modules are another model's, {EXTRACT} writes them anew from the weights"
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # what .bin files put around their tensors
# torch.load meets damage at any depth of zip, pickle and tensor storage
UNREADABLE = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, ValueError, TypeError)
UNREADABLE += (RuntimeError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter read from disk, opened once for everything that is done with it.

    Attributes:
        directory: the folder it was read from.
        config: its configuration.
        tensors: its weights under the names they have on disk.
        layout: what its names follow: NATIVE, or a layout that a family offers; None for neither.
        identity: the base it was trained on; None for adapters of other tools.
        strength: how much of it counts on a model, see `lora.strength`.
    """

    directory: Path
    config: LoraConfig
    tensors: Mapping[str, torch.Tensor]
    layout: str | None
    identity: BaseRecipe | None
    strength: float = 1.0

    @property
    def layout_hint(self) -> str:
        """What to do where a model does not know these names; "" where the names are not the cause."""
        if odd := odd_key(self.tensors):
            return ODD_KEY.format(odd)
        if self.layout in (None, NATIVE):
            return ""
        return (
            f"its keys have the {self.layout} layout, unlike the base's ({min(self.tensors)}): convert it with "
            "`speechtune adapters convert PATH OUTPUT --to native`"
        )

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Hashes of its files: "weights", "config", which scales them, and what lies beside them by name."""
        return {
            "weights": file_sha256(weights_file(self.directory)),
            "config": file_sha256(self.directory / CONFIG_NAME),
            **{path.name: file_sha256(path) for path in addition_files(self.directory)},
        }


def adapter_folder(path: Path) -> Path:
    """The folder that holds an adapter's files: `path`, or the `lora_adapters` in a run's or checkpoint's folder.

    Raises AdapterError: no such folder.
    """
    path = in_checkpoint(path)
    if not path.is_dir():
        raise AdapterError(f"{path}: no such folder; name the folder that holds {CONFIG_NAME}")
    inner = path / FOLDER_NAME
    names = (CONFIG_NAME, WEIGHTS_NAME, BIN_NAME)
    return inner if inner.is_dir() and not any((path / name).exists() for name in names) else path


def in_checkpoint(path: Path) -> Path:
    """The checkpoint where `path` is a `lora_adapters` in it: the original's adapters lay there, ours lie beside."""
    missing = path.name == FOLDER_NAME and not path.exists()
    return path.parent if missing and (path.parent / CONFIG_NAME).is_file() else path


def read_adapter(directory: Path, layouts: Mapping[str, AdapterLayout] | None = None) -> StoredAdapter:
    """Open a saved adapter; refuses one that no base could make good.

    Args:
        directory: its own folder.
        layouts: those its names may follow besides the native one.

    Raises AdapterError: files missing or unreadable, another PEFT method than LoRA, values that are not finite or were
    never trained, weights that are not those MANIFEST.json lists.
    """
    config, tensors = read_config(directory), read_tensors(weights_file(directory))
    issues = value_issues(tensors)
    if not issues and (directory / MANIFEST_NAME).exists():
        # Not the config: it may be changed on purpose, to scale an adapter.
        issues = [str(issue) for issue in manifest_issues(directory) if issue.source != CONFIG_NAME]
    if issues:
        raise AdapterError(f"{directory}: " + "; ".join(issues))
    return StoredAdapter(directory, config, tensors, layout_of(tensors, layouts or {}), read_recipe(directory))


def addition_files(directory: Path) -> list[Path]:
    """The weights in an adapter's folder that are not the adapter's own (`lora.additions`)."""
    return [path for path in sorted(directory.glob("*.safetensors")) if path.name != WEIGHTS_NAME]


def manifest_issues(directory: Path) -> list[Issue]:
    """Differences between an adapter's config and weights and what its folder's MANIFEST.json says of them."""
    beside = {path.name for path in addition_files(directory)}
    return verify_folder(directory, {CONFIG_NAME, weights_file(directory).name, *beside})


def read_config(directory: Path) -> LoraConfig:
    """Configuration of a saved adapter.

    Raises AdapterError: it is missing, unreadable, or not of a LoRA.
    """
    file = directory / CONFIG_NAME
    if not file.is_file():
        raise AdapterError(f"{directory}: no {CONFIG_NAME}; not a PEFT adapter folder")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{file}: not readable as a PEFT configuration: {type(error).__name__}: {error}") from None
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{file}: peft_type is {getattr(config.peft_type, 'value', None)!r}, not 'LORA'")
    if not isinstance(config.r, int) or config.r < 1 or not isinstance(config.lora_alpha, int | float):
        raise AdapterError(f"{file}: r={config.r!r}, lora_alpha={config.lora_alpha!r}: no rank and scale of a LoRA")
    try:
        re.compile(config.target_modules if isinstance(config.target_modules, str) else "")
    except re.error as error:
        raise AdapterError(f"{file}: target_modules={config.target_modules!r}: not a valid regex: {error}") from None
    if not isinstance(config.auto_mapping, dict):
        config.auto_mapping = None  # the original package wrote `true` here
    return config


def weights_file(directory: Path) -> Path:
    """The file of an adapter's tensors: safetensors before .bin, as PEFT chooses.

    Raises AdapterError: neither is there.
    """
    for name in (WEIGHTS_NAME, BIN_NAME):
        if (directory / name).is_file():
            return directory / name
    raise AdapterError(f"{directory}: no {WEIGHTS_NAME} and no {BIN_NAME}: the adapter's weights are missing")


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors or torch file whose names are `wanted`; no pickled code is run.

    Raises AdapterError: the file is not readable; the message says what it holds instead, if that is known.
    """
    try:
        if reason := not_downloaded(path):
            raise AdapterError(f"{path}: {reason}")
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
        # Memory-mapped: of a full checkpoint only the wanted tensors are read.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {name: tensor.clone() for name, tensor in _unwrapped(loaded).items() if wanted(name)}
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AdapterError(f"{path}: truncated or not a weights file: {reason}") from None


def _unwrapped(loaded: object) -> dict[str, torch.Tensor]:
    for name in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError("no tensors by name in it")
    return {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def write_adapter(directory: Path, config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write config and weights of an adapter into an existing folder."""
    config = copy.copy(config)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(modules := getattr(config, name), set):
            setattr(config, name, sorted(modules))  # PEFT writes a set in another order each time
    config.save_pretrained(str(directory))
    own = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}  # none may share memory
    save_file(own, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def value_issues(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong with an adapter's numbers, whatever its base: not finite, or nothing was trained."""
    lora = {name: tensor for name, tensor in tensors.items() if LORA_PART.search(name)}
    if not lora:
        return ["no LoRA tensor in the weights"]
    odd = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    broken = [name for name, tensor in tensors.items() if name not in odd and not bool(tensor.isfinite().all())]
    # The embedding's pair is the other way round: its A starts at zero.
    zero_a = [n for n, tensor in lora.items() if re.search(r"lora_(A|embedding_B)\b", n) and not tensor.any()]
    b_parts = [tensor for name, tensor in lora.items() if re.search(r"lora_(B|embedding_A)\b", name)]
    issues = [f"{name}: dtype {tensors[name].dtype}, not floating point" for name in odd[:3]]
    if broken:
        issues.append(f"NaN or infinity in {len(broken)} tensors (first {broken[0]})")
    if zero_a:
        issues.append(f"{len(zero_a)} lora_A hold only zeros (first {zero_a[0]}): lost in saving, they start random")
    if b_parts and not any(bool(tensor.any()) for tensor in b_parts):
        issues.append(f"every lora_B is zero ({len(b_parts)}): this adapter was never trained")
    return issues


def odd_key(names: Iterable[str]) -> str | None:
    """The first name of a LoRA tensor that is not as PEFT writes it, if any."""
    return next((name for name in names if LORA_PART.search(name) and not PEFT_KEY.fullmatch(name)), None)


def lora_module(name: str) -> str | None:
    """Name of the module in the base that a tensor of an adapter belongs to; None when it is no LoRA tensor."""
    part = LORA_PART.search(name)
    return name[: part.start()].removeprefix(KEY_PREFIX) if part else None


def layout_of(names: Iterable[str], layouts: Mapping[str, AdapterLayout]) -> str | None:
    """The layout that all names of an adapter's tensors follow: one of `layouts`, NATIVE, or None for neither."""
    bare = [name.removeprefix(KEY_PREFIX) for name in names]
    for name, layout in layouts.items():
        if all(layout.names.match(one) for one in bare):
            return name
    native = all(any(layout.native_names.match(one) for layout in layouts.values()) for one in bare)
    return NATIVE if native or not layouts else None
