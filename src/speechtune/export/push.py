"""Upload an adapter to the Hugging Face hub: verified first, with its card, the identity of its base, and samples."""

import logging
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.repocard import RepoCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from speechtune.errors import AdapterError, ConfigError
from speechtune.export.verify import verify_adapter
from speechtune.lora.files import CARD_NAME, adapter_folder

log = logging.getLogger("speechtune")

# The transport's own errors: which library they come from depends on the hub client's version.
HUB_ERRORS: tuple[type[Exception], ...] = tuple(
    kind for kind in HfHubHTTPError.__mro__ if kind.__name__ in ("HfHubHTTPError", "HTTPError")
)
SAMPLES = "samples"
MAX_SAMPLES = 20


@dataclass(frozen=True, slots=True)
class Upload:
    """What goes where: `files` maps the path in the repository to the local file."""

    repository: str
    private: bool
    files: dict[str, str]
    bytes: int
    url: str | None


def plan_upload(path: Path, repository: str, *, private: bool, samples: bool = True) -> Upload:
    """Check an adapter and its card, and list what an upload would send.

    Args:
        path: adapter, run or checkpoint folder.
        repository: "owner/name" on the hub.
        private: make a new repository private.
        samples: send recordings of the run's last evaluation too, where there are some.

    Raises AdapterError: the adapter is damaged, or was never trained; ConfigError: no such name on the hub could be, or
    the card's metadata is not valid.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository!r}: no name of a repository: {error}") from None
    if repository.count("/") != 1:
        raise ConfigError(f"{repository!r}: a repository is named owner/name")
    folder = adapter_folder(path)
    verified = verify_adapter(folder, look_up_base=False)
    if not verified.valid:
        raise AdapterError(f"{folder}: not uploaded: {'; '.join(verified.issues)}")
    _check_card(folder / CARD_NAME)
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    if samples:
        files |= _samples(folder.parent / SAMPLES)
    size = sum(file.stat().st_size for file in files.values())
    return Upload(repository, private, {name: str(file) for name, file in files.items()}, size, None)


def _check_card(file: Path) -> None:
    """Refuse a card without a metadata block that the hub reads."""
    try:
        card = RepoCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except OSError as error:
        raise ConfigError(f"{file}: no model card: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: the metadata block is not valid: {error}") from None
    missing = [name for name in ("library_name", "pipeline_tag") if not card.data.get(name)]
    if missing:
        raise ConfigError(f"{file}: the metadata block has no {missing[0]}")


def _samples(directory: Path) -> dict[str, Path]:
    """Recordings of the last evaluation, by their place in the repository."""
    rounds = sorted(directory.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    last = rounds[-1:] if len(rounds) > 1 else []  # step 0 alone is the base's
    return {f"{SAMPLES}/{file.name}": file for folder in last for file in sorted(folder.glob("*.wav"))[:MAX_SAMPLES]}


def upload(plan: Upload, *, api: HfApi | None = None) -> str:
    """Create the repository if need be and send everything in one commit; the address of the commit.

    Raises ConfigError: the hub refuses, or does not answer.
    """
    api = api or HfApi()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in plan.files.items()]
    try:
        api.create_repo(plan.repository, private=plan.private, exist_ok=True)
        info = api.create_commit(plan.repository, operations, commit_message="Adapter trained with speechtune")
    except (*HUB_ERRORS, OSError, ValueError) as error:
        cure = "log in with `hf auth login`, with a token that may write"
        raise ConfigError(f"{plan.repository}: the hub did not take it: {error}; {cure}") from None
    return str(info.commit_url)
