"""Whisper conditioning: what Whisper hears in a reference is added to the embeddings of the reference's own rows.

An addition to the base, off by default. No position is added, so with the gate at zero the model is the base bit for
bit, whatever computes its attention (decision 0015).

Shapes: F codec frames of a clip, K codebooks, R = F + K + 1 rows, T Whisper's positions, W its width, D hidden size,
N reference rows of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from speechtune.errors import AdapterError, ConfigError, ManifestError
from speechtune.families.higgs_audio_v2.options import Config
from speechtune.families.higgs_audio_v2.whisper import WhisperEncoder, whisper_config, whisper_fingerprint
from speechtune.lora.additions import Addition
from speechtune.lora.base_identity import read_recipe
from speechtune.precision import plan_precision
from speechtune.types import Sample

NAME = "reference_projector"
GAIN = 20
"""Adam opens the gate by the learning rate a step: without it 80 steps added 0.2 % to the rows (decision 0015)."""
FILE_NAME = f"{NAME}.safetensors"
USE_IT = "name its Whisper with model.reference_conditioning=whisper and model.whisper_path, or --whisper-path"
CARD_NOTE = (
    "It was trained with what the encoder of the Whisper `{}` hears in the reference. Plain PEFT loads the LoRA part "
    f"alone, plain transformers the model alone: without `{FILE_NAME}` it answers otherwise than it was trained to. "
    "speechtune loads both."
)
LEAVE_IT = (
    "leave model.reference_conditioning and model.whisper_path, or --whisper-path, out (or evaluate with --no-base)"
)


class ReferenceProjector(Addition):
    """Layer norm, linear, GELU, linear, and a gate of one number a channel that starts at zero: (N, W) to (N, D).

    `row_size` is the root mean square of the base's audio rows, the measure of what is added to them.
    """

    scale: torch.Tensor

    def __init__(self, width: int, hidden_size: int, row_size: torch.Tensor, facts: Mapping[str, str]) -> None:
        super().__init__()
        self.facts = facts
        self.register_buffer("scale", GAIN * row_size.reshape(1))
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, features_NW: torch.Tensor) -> torch.Tensor:
        return self.scale * self.gate * self.down(nn.functional.gelu(self.up(self.norm(features_NW))))


def reference_rows(
    codes: Sequence[np.ndarray], heard: Sequence[np.ndarray], positions: int | None, width: int
) -> np.ndarray:
    """What Whisper heard at each row of some references, float32 (N, W): the mean over the row's share of the clip.

    Args:
        codes: of each reference, (F, K); row r of a clip holds frame r - 1 of its first codebook.
        heard: of the same, (T, W).
        positions: how many means are taken of a clip; None takes one a codec frame.
        width: W, for samples without a reference.
    """
    rows = [np.zeros((0, width), np.float32)]
    for codes_FK, heard_TW in zip(codes, heard, strict=True):
        (num_frames, num_codebooks), count = codes_FK.shape, positions or len(codes_FK)
        heard_1WT = torch.from_numpy(heard_TW.astype(np.float32)).T[None]
        means_PW = nn.functional.adaptive_avg_pool1d(heard_1WT, count)[0].T.numpy()
        frames_R = np.clip(np.arange(num_frames + num_codebooks + 1) - 1, 0, num_frames - 1)
        rows.append(means_PW[frames_R * count // num_frames])
    return np.concatenate(rows)


def batch_rows(features: Sequence[np.ndarray], starts: Sequence[int]) -> dict[str, torch.Tensor]:
    """The reference rows of a batch: their features (N, W), and which audio rows of the batch they are (N,).

    A sample's references come first among its audio rows, which begin at its entry of `starts`.
    """
    places = [start + np.arange(len(rows_NW)) for start, rows_NW in zip(starts, features, strict=True)]
    return {
        "reference_features": torch.from_numpy(np.concatenate(features)),
        "reference_rows": torch.from_numpy(np.concatenate(places)),
    }


@contextmanager
def conditioned(base: Any, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While it lasts, the first rows that the base embeds get what its projector makes of `batch_rows`.

    All paths embed their rows by one module: training, fast or native, and generation, where the prompt comes first.
    A batch without a reference passes the projector too, with no rows: DDP waits for the gradient of every parameter.
    """
    projector = getattr(base, NAME, None)
    if projector is None:
        yield
        return
    features_NW, rows_N = inputs["reference_features"], inputs["reference_rows"]

    def add(module: nn.Module, arguments: object, embeddings: torch.Tensor) -> torch.Tensor:
        handle.remove()
        added_ND = projector(features_NW).to(embeddings.dtype)
        return embeddings.flatten(0, -2).index_add(0, rows_N, added_ND).view_as(embeddings)

    handle = base.model.embed_audio_tokens.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def folder_issue(directory: Path) -> str | None:
    """What is wrong with an adapter's folder: it was trained with conditioning, and its projector is not there."""
    recipe = read_recipe(directory)
    if recipe is None or not recipe.prepared.get("reference_conditioning") or (directory / FILE_NAME).is_file():
        return None
    return (
        f"{FILE_NAME} is missing: the adapter was trained with reference conditioning, and its projector lay beside "
        "it; copy the complete folder"
    )


class Conditioning:
    """What a recipe says of conditioning, on or off, and what follows from it."""

    def __init__(self, config: Config) -> None:
        self.settings, self._config = config.model, config
        self.is_on = config.model.reference_conditioning is not None
        self._path = str(config.model.whisper_path)

    @property
    def encoder(self) -> WhisperEncoder | None:
        """Whisper's encoder, a new one each time, in the precision of the run; None where conditioning is off."""
        if not self.is_on:
            return None
        plan = plan_precision(self._config.train.precision, full_finetune=not self._config.lora.enabled)
        return WhisperEncoder(self._path, self._fingerprint, plan)

    @cached_property
    def _fingerprint(self) -> str:
        return whisper_fingerprint(self._path)

    @cached_property
    def width(self) -> int:
        """W; 0 where conditioning is off."""
        return whisper_config(self._path).d_model if self.is_on else 0

    @property
    def recipe(self) -> dict[str, Any]:
        """What an adapter trained with it must find again; empty where it is off."""
        if not self.is_on:
            return {}
        kind, positions = self.settings.reference_conditioning, self.settings.reference_positions
        return {"reference_conditioning": kind, "whisper": self._fingerprint, "reference_positions": positions}

    @property
    def card_note(self) -> str:
        """A sentence for the model card: what is missing where only the LoRA part is loaded."""
        return CARD_NOTE.format(self._path) if self.is_on else ""

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples of which none has a reference."""
        if self.is_on and samples and not any(sample.references for sample in samples):
            raise ConfigError(
                "model.reference_conditioning: none of the samples has a reference, so nothing would be heard: name "
                "references in the data, or remove the option"
            )

    def split(self, sample: Sample, features: Sequence[np.ndarray]) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """Codes of all clips of a sample, and what Whisper heard at the rows of its references (N, W)."""
        count = len(sample.references) + (sample.audio is not None)
        codes, heard = features[:count], features[count:]
        expected = len(sample.references) if self.is_on else 0
        if len(heard) != expected:
            raise ManifestError(f"sample {sample.id}: Whisper heard {len(heard)} of {expected} references")
        return codes, reference_rows(codes[:expected], heard, self.settings.reference_positions, self.width)

    def made_up(self, num_positions: int) -> list[np.ndarray]:
        """Features of a reference for probes, fixed and from no audio; none where conditioning is off."""
        return [np.cos(np.arange(num_positions * self.width)).reshape(num_positions, -1)] if self.is_on else []

    def add_projector(self, base: Any, adapter: Path | None, *, training: bool) -> None:
        """Attach the projector: that of the adapter's folder, else of the base's, else a fresh one.

        Raises AdapterError: a model is used without what it was trained with, or with what it was not trained with;
        ConfigError: it cannot be trained that way.
        """
        settings = self.settings
        folders = [folder for folder in (adapter, Path(settings.path)) if folder and (folder / FILE_NAME).is_file()]
        if folders and not self.is_on:
            raise AdapterError(
                f"{folders[0]}: trained with reference conditioning ({FILE_NAME}), without which it would answer "
                f"otherwise than it was trained to: {USE_IT}"
            )
        if not self.is_on:
            return
        if not folders and not training:
            raise AdapterError(
                f"{adapter or settings.path}: trained without reference conditioning ({FILE_NAME} is not there): "
                f"{LEAVE_IT}"
            )
        if not folders and settings.freeze_reference_projector:
            raise ConfigError(
                "model.freeze_reference_projector: there is no trained projector, and a fresh one adds nothing while "
                "it is frozen: train it, or start from a model or adapter that has one"
            )
        facts = {"whisper_path": self._path, "reference_positions": str(settings.reference_positions)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._config.train.seed)  # all ranks start alike
            projector = ReferenceProjector(self.width, base.config.hidden_size, _row_size(base), facts)
        if folders:
            _load(projector, folders[0] / FILE_NAME)
        projector.requires_grad_(training and not settings.freeze_reference_projector)
        setattr(base, NAME, projector.to(base.device))


def _row_size(base: Any) -> torch.Tensor:
    """Root mean square of an audio row, as far as the entries of the K codebooks that it sums are independent."""
    table = next(base.model.embed_audio_tokens.parameters()).detach().float()
    return (table.square().mean() * base.config.num_codebooks).sqrt()


def _load(projector: ReferenceProjector, file: Path) -> None:
    """Fill a projector from its file.

    Raises AdapterError: the file is damaged, or was made for another model, Whisper or number of positions.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            facts = stored.metadata() or {}
            tensors = {name.removeprefix(f"{NAME}."): stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: truncated or not a weights file: {error}") from None
    wanted = projector.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
        raise AdapterError(
            f"{file}: made for another Whisper or another base (trained with {facts.get('whisper_path')}): its tensors "
            f"are {shapes}"
        )
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise AdapterError(f"{file}: NaN or infinity in {', '.join(broken)}")
    positions = projector.facts["reference_positions"]
    if facts.get("reference_positions", positions) != positions:
        raise AdapterError(
            f"{file}: trained with model.reference_positions={facts['reference_positions']}, here it is {positions}; "
            "set it as in training (--reference-positions)"
        )
    projector.load_state_dict(tensors)
