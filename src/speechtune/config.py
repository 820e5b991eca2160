"""`RunConfig`: every option of a run, once; a YAML recipe plus dotted overrides in, a frozen object out."""

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from speechtune.errors import ConfigError

TrackerName = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]

Paths = Path | Annotated[tuple[Path, ...], Field(min_length=1)]


class Section(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()):
    """Base of all sections: frozen, unknown keys refused, field docstrings kept as descriptions."""


class ModelConfig(Section, frozen=True):
    """The base model; a family adds options for what belongs to it."""

    path: str
    """Hub id or local folder of the base model."""
    revision: str | None = None
    """Commit or tag on the hub; None takes the default branch."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""


class DataConfig(Section, frozen=True):
    """Where the samples come from and what is refused; a family adds options for what is made of them."""

    train: Paths | None = None
    """Training data, one or a list, each in any layout of docs/data.md: a manifest, a table, parquet, a folder of
    clips and texts; for assessment a Speechocean762 folder (or its `train`), or rows with `task` and `target`."""
    eval: Paths | None = None
    """Evaluation data, the same; not together with `validation_split`."""
    validation_split: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share held out by seed, at least one: of the samples, or of the speakers where pronunciation is assessed."""
    audio_root: Paths | None = None
    """Confine every audio path to this folder, or to these, symbolic links and `..` resolved."""
    allow_urls: bool = False
    """Fetch audio given as http(s) URL; refused by default."""
    min_seconds: float = Field(default=0.1, gt=0.0)
    """Shortest clip accepted."""
    max_seconds: float = Field(default=60.0, gt=0.0)
    """Longest clip accepted."""
    on_error: Literal["fail", "quarantine"] = "fail"
    """Stop at invalid rows, or write them to a quarantine file and train on the rest."""
    quarantine_limit: float = Field(default=0.05, ge=0.0, le=1.0)
    """Largest share of rows that quarantine may set aside before the run stops all the same."""
    cache_dir: Path | None = None
    """Folder of the encoded set; None puts it in `speechtune-cache` beside the run directory."""


class LoraSettings(Section, frozen=True):
    """The adapter to train; `enabled: false` trains the full model."""

    enabled: bool = True
    """Train a LoRA adapter instead of all weights."""
    rank: int = Field(default=16, ge=1)
    """r of LoRA."""
    alpha: float = Field(default=32, gt=0.0)
    """Scaling numerator; the adapter is multiplied by alpha / r (alpha / sqrt(r) with rsLoRA)."""
    dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Dropout before lora_A."""
    targets: str = "default"
    """A preset of the family, or a regex over module names."""
    rslora: bool = False
    """Rank-stabilised scaling."""
    dora: bool = False
    """Weight-decomposed LoRA."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and stored with the adapter."""
    trainable_tokens: tuple[str, ...] = ()
    """Control tokens of the family whose embeddings are trained with the adapter."""
    initial: Path | None = None
    """Adapter to start from, of this rank, alpha and targets: its folder, or its run's or checkpoint's."""


class TrainConfig(Section, frozen=True):
    """Optimisation."""

    epochs: float = Field(default=3.0, gt=0.0)
    """Passes over the training set; ignored when `max_steps` is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(default=4, ge=1)
    """Samples per device and micro-batch."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step."""
    learning_rate: float = Field(default=5e-5, gt=0.0)
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear warm-up; shortened to a tenth of the run when the run is short."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    eps: float = Field(default=1e-8, gt=0.0)
    """AdamW epsilon."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """Clip the global gradient norm to this value."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Recompute activations in the backward pass; saves memory, costs time. auto: only if need be."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto decides by device; see `speechtune doctor`."""
    head_weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each head's mean loss; 1.0 where not named."""
    group_by_length: bool = True
    """Put samples of like length into the same micro-batch of a global batch (the global batch stays random)."""
    freeze: str | None = None
    """Regex over parameter names kept frozen in full fine-tuning; with LoRA the base is frozen anyway."""
    seed: int = 42
    """Seeds adapter initialisation, order of samples, dropout and the validation split."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that collate batches ahead of the loop; None takes 2 beside a GPU and none without one."""


class BatchConfig(Section, frozen=True):
    """What one forward pass takes. The samples of an optimizer step are not changed by it, only how they are cut."""

    tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Most positions of one micro-batch on one device: a step's `train.batch_size` x `train.accumulation` samples per
    rank are cut to fit. None cuts by number of samples; auto measures what fits this device, as `speechtune fit`."""
    packing: bool = True
    """Lay samples end to end without padding, attention kept within each; False pads them to the longest."""
    on_oom: Literal["fail", "halve"] = "fail"
    """When a step does not fit the memory: stop and say so, or halve the budget and take the step again (one rank)."""


class SpeedConfig(Section, frozen=True):
    """How the same mathematics is computed."""

    fast_forward: bool = True
    """The toolkit's forward pass of the family's layers; False takes transformers' own."""
    compile: bool = False
    """Norms and gated units of the fast forward fused by torch.compile, where there is a compiler; not with `liger`."""
    liger: bool = False
    """Liger kernels (extra `liger`) for norms and gated units of the fast forward, on a GPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several ranks: a complete model each (DDP), or its weights sharded over them (FSDP2)."""


class EvaluateConfig(Section, frozen=True):
    """Evaluation during training."""

    enabled: bool = True
    """False turns evaluation off even when an evaluation set is given."""
    every_steps: int = Field(default=500, ge=1)
    """Steps between evaluations."""
    batch_size: int = Field(default=1, ge=1)
    """Samples per device in evaluation."""
    prompts: int | None = Field(default=None, ge=0)
    """Samples answered and scored at every evaluation, always the same ones, chosen by seed; None takes 4 where
    there is evaluation data and 0 where there is none (a number takes them from the training data then)."""
    temperature: float | None = Field(default=None, ge=0.0)
    """Of these answers; 0 is greedy, None what the model's generation config says (for assessment: greedy)."""
    asr: str | None = None
    """Recogniser for the word error rate, such as `faster-whisper:base.en` or `whisper:openai/whisper-large-v3`."""
    speaker: str | None = None
    """Speaker encoder for the similarity to the reference, such as `wavlm:microsoft/wavlm-base-plus-sv`."""
    mos: str | None = None
    """Predictor of the mean opinion score: `distillmos` or `dnsmos`."""
    best_metric: str = "loss"
    """What makes a checkpoint the best: `loss`, or a score of the family's evaluation such as `sim` or `pcc_total`."""
    patience: int | None = Field(default=None, ge=1)
    """Evaluations in a row without a better `best_metric` after which the run stops early; None never stops."""


class CheckpointConfig(Section, frozen=True):
    """Saving and resuming."""

    every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = Field(default=3, ge=1)
    """Checkpoints kept; the best one by `evaluate.best_metric` is kept besides."""
    final: Literal["last", "best"] = "last"
    """Whose weights `lora_adapters` holds at the end: the last step's, or those of the best checkpoint."""
    resume: str | None = None
    """`auto` (newest checkpoint that verifies, or a fresh start), or the path of a checkpoint."""
    force: bool = False
    """Resume even with other data, base, seed or batch than the checkpoint's; each difference is warned of."""


class TrackingConfig(Section, frozen=True):
    """What is written down."""

    log_every_steps: int = Field(default=10, ge=1)
    """Steps between console lines; metrics.jsonl gets every step."""
    log_saves: bool = True
    """Console lines on what each save wrote, file by file, and verified; False leaves one line a checkpoint."""
    detail_every_steps: int | None = Field(default=None, ge=1)
    """Steps between console lines that name the samples of the step, their positions and targets; None for none."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers of accelerate; empty for none."""
    logging_dir: Path | None = None
    """Folder for trackers, in which each run has its own; None means `logs` in the run directory."""


class RunConfig(Section, frozen=True):
    """One run: a base model, data, an adapter and a training schedule; a family's own has more options."""

    family: str
    """Name of the model family."""
    output_dir: Path = Path("output")
    """Run directory: checkpoints, adapter, metrics, resolved config."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    lora: LoraSettings = LoraSettings()
    train: TrainConfig = TrainConfig()
    batch: BatchConfig = BatchConfig()
    speed: SpeedConfig = SpeedConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        if self.data.eval is not None and self.data.validation_split > 0:
            named, share = self.data.model_dump(mode="json")["eval"], self.data.validation_split
            raise ValueError(f"data.eval ({named}) and data.validation_split ({share:g}) are both set: remove one")
        if (self.speed.compile or self.speed.liger) and not self.speed.fast_forward:
            raise ValueError("speed.compile and speed.liger are parts of speed.fast_forward, which is off: remove them")
        if self.speed.compile and self.speed.liger:
            raise ValueError("speed.compile and speed.liger are two ways to do the same: set one")
        if self.lora.initial is not None and not self.lora.enabled:
            raise ValueError("lora.initial is for an adapter, and lora.enabled is false: remove one of them")
        if self.train.freeze is not None and self.lora.enabled:
            raise ValueError("train.freeze is for full fine-tuning; with lora.enabled the base is frozen: remove it")
        return self

    @property
    def cache_dir(self) -> Path:
        """Folder of the encoded set."""
        return self.data.cache_dir or self.output_dir.parent / "speechtune-cache"

    def to_yaml(self) -> str:
        """The resolved configuration as a recipe that `load_config` accepts."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


ConfigT = TypeVar("ConfigT", bound=Section)


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def build_config(values: dict[str, Any], where: str, kind: type[ConfigT], issues: Sequence[str] = ()) -> ConfigT:
    """Validate nested `values`; every issue is listed in one ConfigError that starts with `where`.

    `kind` is the family's class of options, see `speechtune.families.config_class`; `issues` are known already.
    """
    lines = list(issues)
    try:
        config = kind.model_validate(values)
        if not lines:
            return config
    except ValidationError as error:
        known = option_names(kind)
        lines += [_describe(item, known) for item in _one_an_option(error.errors(include_url=False))]
    raise ConfigError("\n  ".join([f"{where}: {len(lines)} issue(s) in the configuration", *lines]), tuple(lines))


def load_config(recipe: Path, overrides: Sequence[str], kind_of: Callable[[object], type[ConfigT]]) -> ConfigT:
    """Read a YAML recipe, or the shipped one of that name, and apply `section.key=value` overrides (values are YAML).

    `kind_of` gives the class of options for the recipe's `family`.
    Raises ConfigError: the file, an override or a value cannot be used; names each one.
    """
    shipped = shipped_recipes()
    recipe = recipe if recipe.is_file() else shipped.get(str(recipe).removesuffix(".yaml"), recipe)
    try:
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(shipped)
        message = f"{recipe}: cannot read the recipe: {error.strerror}; recipes that come with speechtune: {names}"
        raise ConfigError(message) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{recipe}: a recipe is a mapping of sections, found {type(values).__name__}")
    # Names are not looked at here: validation refuses an unknown one, in the recipe and in an override alike.
    issues = [issue for override in overrides if (issue := apply_override(values, override)) is not None]
    where = f"{recipe}, with {len(overrides)} override(s)" if overrides else str(recipe)
    return build_config(values, where, kind_of(values.get("family")), issues)


def option_names(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all options, in order of definition."""
    names: list[str] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += option_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def apply_override(values: dict[str, Any], override: str) -> str | None:
    """Put one override into nested `values`; what is wrong with its form, if anything."""
    name, separator, text = override.partition("=")
    if not name or not separator:
        return f"override {override!r}: expected section.key=value, e.g. train.epochs=3"
    try:
        value = yaml.safe_load(text)  # reads 2e-5 as a text; pydantic makes the number of it where one is wanted
    except yaml.YAMLError:
        return f"override {override!r}: {text!r} is not a YAML value"
    *sections, key = name.split(".")
    node = values
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            return f"override {override!r}: {section!r} is not a section in the recipe"
    node[key] = value
    return None


def _one_an_option(items: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """One issue where pydantic lists one for every type that an option may have."""
    issues: dict[tuple[int | str, ...], ErrorDetails] = {}
    for item in items:
        place = item["loc"]
        place = place[:2] if place[:2] in OPTIONS_OF_TWO_TYPES else place
        if place in issues:
            issues[place]["msg"] += f", or {item['msg'].removeprefix('Input should be ')}"
        else:
            issues[place] = {**item, "loc": place}
    return list(issues.values())


def _describe(item: ErrorDetails, known: Sequence[str]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name}: no such option{_advice(name, known)}"
    if item["type"] == "missing":
        return f"{name}: required, but not given"
    if item["type"] == "model_type":
        return f"{name}: a section of options, not a value (got {item['input']!r})"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and not name:
        return message
    return f"{name}: {message} (got {item['input']!r})"


def _advice(name: str, known: Sequence[str]) -> str:
    """What to write in place of an option that does not exist."""
    other_names = yaml.safe_load((Path(__file__).parent / "assets/option_names.yaml").read_text(encoding="utf-8"))
    last = name.rpartition(".")[2].lower().replace("-", "_").lstrip("_")
    if last in other_names["no_option"]:
        return f": {other_names['no_option'][last]}"

    def likeness(option: str) -> tuple[float, ...]:
        # The last part counts first: a shared "train." must not make train.eps the nearest to train.lr.
        pairs = ((last, option.rpartition(".")[2]), (name, option))
        return tuple(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    same = [option for option, others in other_names["options"].items() if last in others]
    nearest = max(same or [*known, *dict.fromkeys(option.partition(".")[0] for option in known)], key=likeness)
    return f"; did you mean {nearest!r}?" if same or likeness(nearest)[0] >= 0.6 else ""


OPTIONS_OF_TWO_TYPES = {("data", name) for name in ("train", "eval", "audio_root")}
OPTIONS_OF_TWO_TYPES |= {("batch", "tokens"), ("train", "gradient_checkpointing")}
"""One or several; a number or yes-or-no, or `auto`; a test compares this with the annotations."""


def world_size() -> int:
    """Number of processes of this launch, from the environment torchrun sets."""
    return int(os.environ.get("WORLD_SIZE", "1"))


DEFAULT_PROMPTS = 4


def is_first_rank() -> bool:
    """Whether this process is the first of its launch, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def num_prompts(config: RunConfig) -> int:
    """How many prompts a run answers at every evaluation."""
    settings = config.evaluate
    default = DEFAULT_PROMPTS if has_evaluation_data(config) else 0
    return 0 if not settings.enabled else default if settings.prompts is None else settings.prompts


def has_evaluation_data(config: RunConfig) -> bool:
    """Whether the recipe names evaluation data, or holds some out."""
    return config.evaluate.enabled and (config.data.eval is not None or config.data.validation_split > 0)
