"""Configuration: every shipped recipe loads, nothing unknown is swallowed, and an issue names the option and a cure."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from speechtune.config import OPTIONS_OF_TWO_TYPES, RunConfig, option_names, shipped_recipes
from speechtune.errors import ConfigError
from speechtune.families import build_config, config_class, family_packages, load_config

RECIPES = list(shipped_recipes().values())
OTHER_NAMES = yaml.safe_load((files("speechtune") / "assets/option_names.yaml").read_text(encoding="utf-8"))
SMALLEST = {"family": "higgs_audio_v2", "model": {"path": "base"}}

# Recipes of users name these: removing or renaming one breaks them. A change here is deliberate, and has a line in
# CHANGELOG.md.
OPTIONS = """\
family output_dir
model.path model.revision model.attention
data.train data.eval data.validation_split data.audio_root data.allow_urls data.min_seconds
data.max_seconds
data.on_error data.quarantine_limit data.cache_dir
lora.enabled lora.rank lora.alpha lora.dropout lora.targets lora.rslora lora.dora lora.modules_to_save
lora.trainable_tokens lora.initial
train.epochs train.max_steps train.batch_size train.accumulation train.learning_rate train.schedule train.warmup_steps
train.weight_decay train.betas train.eps train.max_grad_norm train.gradient_checkpointing train.precision
train.head_weights train.group_by_length train.freeze train.seed train.workers
batch.tokens batch.packing batch.on_oom
speed.fast_forward speed.compile speed.liger speed.parallel
evaluate.enabled evaluate.every_steps evaluate.batch_size evaluate.prompts evaluate.temperature evaluate.asr
evaluate.speaker evaluate.mos evaluate.best_metric evaluate.patience
checkpoint.every_steps checkpoint.keep_last checkpoint.final checkpoint.resume checkpoint.force
tracking.log_every_steps tracking.log_saves tracking.detail_every_steps tracking.trackers tracking.logging_dir
"""

DEFAULTS = {
    "data.validation_split": 0.0,
    "data.allow_urls": False,
    "data.max_seconds": 60.0,
    "data.on_error": "fail",
    "lora.enabled": True,
    "lora.rank": 16,
    "lora.alpha": 32.0,
    "train.batch_size": 4,
    "train.learning_rate": 5e-5,
    "train.warmup_steps": 100,
    "train.precision": "auto",
    "train.seed": 42,
    "evaluate.every_steps": 500,
    "checkpoint.every_steps": 500,
    "checkpoint.keep_last": 3,
    "checkpoint.resume": None,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALLEST), encoding="utf-8")
    return path


def value_of(config: RunConfig, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_recipes_are_found() -> None:
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    written = tmp_path / "resolved.yaml"
    written.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(written) == config


def test_a_round_trip_keeps_every_value(tmp_path: Path) -> None:
    """Values that YAML or JSON could turn into something else: small floats, tuples, paths, texts of any script."""
    values = {
        "family": "higgs_audio_v2",
        "output_dir": tmp_path / "väljund 1",
        "model": {"path": "base", "revision": "1e5"},
        "data": {"train": tmp_path / "データ.json", "max_seconds": 0.30000000000000004},
        "lora": {"modules_to_save": ("audio_lm_head",), "alpha": 2e-5},
        "train": {"learning_rate": 1e-7, "betas": (0.9, 0.999), "head_weights": {"text": 0.1}, "max_steps": 7},
        "tracking": {"trackers": ()},
    }
    config = build_config(values, "test")
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config
    assert config.lora.alpha == 2e-5 and config.tracking.trackers == () and config.model.revision == "1e5"


def undescribed(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Options without a docstring."""
    names = []
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += undescribed(info.annotation, f"{prefix}{name}.")
        elif not info.description:
            names.append(prefix + name)
    return names


def test_the_list_of_options_is_frozen() -> None:
    assert option_names(RunConfig) == OPTIONS.split()


@pytest.mark.parametrize("family", family_packages())
def test_the_options_of_a_family_are_frozen(family: str) -> None:
    """Those it adds stand in `options.txt` beside its tests."""
    added = [name for name in option_names(config_class(family)) if name not in OPTIONS.split()]
    frozen = Path(__file__).parent / "families" / family / "options.txt"
    assert added == frozen.read_text(encoding="utf-8").split()
    assert undescribed(config_class(family)) == []


def test_an_option_of_another_family_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.speech_lora: no such option"):
        build_config({"family": "higgs_audio_v2", "model": {"path": "base", "speech_lora": "merge"}}, "test")


@pytest.mark.parametrize(("name", "expected"), DEFAULTS.items())
def test_defaults_that_users_rely_on(name: str, expected: object) -> None:
    assert value_of(build_config(SMALLEST, "test"), name) == expected


def test_every_option_is_described() -> None:
    """`speechtune` prints the docstrings as help; an option without one is an option nobody can use."""
    assert undescribed(RunConfig) == []


def test_the_configuration_is_frozen() -> None:
    config = build_config(SMALLEST, "test")
    with pytest.raises(ValidationError):
        config.train.seed = 1  # type: ignore[misc]


UNKNOWN = {
    "misspelt": ({"train": {"learning_rat": 1e-4}}, "train.learning_rat", "train.learning_rate"),
    "right name, wrong section": ({"lora": {"batch_size": 2}}, "lora.batch_size", "train.batch_size"),
    "right name, no section": ({"learning_rate": 1e-4}, "learning_rate", "train.learning_rate"),
    "the original pipeline's name": ({"lora": {"lora_rank": 2}}, "lora.lora_rank", "lora.rank"),
    "misspelt section": ({"trian": {"epochs": 1}}, "trian", ""),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest_name(case: str) -> None:
    """A misspelt option that is ignored trains with the default: the original pipeline lost flags on their way so."""
    values, named, nearest = UNKNOWN[case]
    with pytest.raises(ConfigError) as caught:
        build_config({**SMALLEST, **values}, "recipe.yaml")
    message = str(caught.value)
    assert message.startswith("recipe.yaml: 1 issue(s)") and f"{named}: no such option" in message
    assert f"did you mean {nearest!r}?" in message if nearest else True
    assert caught.value.exit_code == 2


def test_all_issues_are_reported_at_once() -> None:
    values = {"family": "x", "train": {"epochs": -1, "batch_size": "many", "sede": 1}, "lora": {"rank": 0}}
    with pytest.raises(ConfigError) as caught:
        build_config(values, "recipe.yaml")
    message = str(caught.value)
    assert "6 issue(s)" in message
    for part in (
        "family: no family 'x'",
        "model: required",
        "train.epochs",
        "train.batch_size",
        "'many'",
        "train.sede",
        "lora.rank",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=2e-5", 2e-5),
        ("train.learning_rate=0.5", 0.5),
        ("train.max_steps=10", 10),
        ("train.max_steps=null", None),
        ("train.gradient_checkpointing=true", True),
        ("lora.enabled=false", False),
        ("lora.targets=.*\\.q_proj", ".*\\.q_proj"),
        ("lora.modules_to_save=[a, b]", ("a", "b")),
        ("tracking.trackers=[]", ()),
        ("train.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("output_dir=/somewhere/else", Path("/somewhere/else")),
        ("model.path=org/name=odd", "org/name=odd"),
        ("model.revision=7e12345", "7e12345"),
        ("model.revision='1234567'", "1234567"),
        ("train.precision=bf16", "bf16"),
    ],
)
def test_overrides_are_typed(recipe: Path, override: str, expected: object) -> None:
    """YAML 1.1 reads 2e-5 as a text: a learning rate given so must arrive as a number, a commit id as a text."""
    value = value_of(load_config(recipe, [override]), override.partition("=")[0])
    assert value == expected and type(value) is type(expected)


def test_overrides_reach_head_weights_and_come_after_the_recipe(recipe: Path) -> None:
    config = load_config(recipe, ["train.head_weights.text=0.5", "train.head_weights.audio=2", "train.seed=1"])
    assert config.train.head_weights == {"text": 0.5, "audio": 2.0} and config.train.seed == 1
    assert load_config(recipe, ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.learning_rate", ["section.key=value"]),
        ("=1", ["section.key=value"]),
        ("train.learning_rat=1", ["train.learning_rat: no such option", "'train.learning_rate'"]),
        ("learning_rate=1", ["no such option", "'train.learning_rate'"]),
        ("data.batch_size=1", ["no such option", "'train.batch_size'"]),
        ("train=1", ["train: a section of options"]),
        ("family.name=x", ["'family' is not a section"]),
        ("train.betas=[1, ", ["not a YAML value"]),
        ("train.batch_size=two", ["train.batch_size", "'two'"]),
        ("train.batch_size=1.5", ["train.batch_size", "1.5"]),
        ("train.learning_rate=0", ["train.learning_rate", "greater than 0"]),
        ("train.learning_rate=nan", ["train.learning_rate"]),
        ("train.schedule=cosin", ["train.schedule", "'cosine'"]),
    ],
)
def test_a_bad_override_is_refused(recipe: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    for part in parts:
        assert part in str(caught.value), str(caught.value)


BROUGHT = """
learning_rate lr per_device_train_batch_size gradient_accumulation_steps grad_accum num_train_epochs max_steps
warmup_steps warmup_ratio save_steps eval_steps logging_steps save_total_limit lr_scheduler_type weight_decay adam_beta1
adam_beta2 adam_epsilon max_grad_norm bf16 fp16 gradient_checkpointing output_dir report_to seed dataloader_num_workers
resume_from_checkpoint group_by_length optim torch_compile use_liger_kernel fsdp deepspeed per_device_eval_batch_size
metric_for_best_model load_best_model_at_end r lora_alpha lora_dropout target_modules use_rslora use_dora
modules_to_save trainable_token_indices init_lora_weights bias task_type model_name_or_path attn_implementation
"""


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("train.lr", "train.learning_rate"),
        ("train.save_steps", "checkpoint.every_steps"),
        ("train.grad_accum", "train.accumulation"),
        ("lora.r", "lora.rank"),
        ("train.LR-Scheduler-Type", "train.schedule"),
        ("logging_steps", "tracking.log_every_steps"),
        ("train.patience", "evaluate.patience"),
    ],
)
def test_names_from_other_trainers_lead_to_the_option(recipe: Path, name: str, option: str) -> None:
    """Guards against suggestions by spelling alone: train.lr gave train.eps, train.save_steps gave train.max_steps."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [f"{name}=1"])
    assert f"{name}: no such option; did you mean {option!r}?" in str(caught.value)


def test_the_table_of_other_names_is_right() -> None:
    """Every option in it exists, no name stands in it twice, and none is an option's own."""
    options = OTHER_NAMES["options"]
    assert set(options) <= set(option_names(RunConfig))
    names = [name for others in options.values() for name in others] + list(OTHER_NAMES["no_option"])
    own = {option.rpartition(".")[2] for option in option_names(RunConfig)}
    assert len(names) == len(set(names)) and own.isdisjoint(names)
    assert set(BROUGHT.split()) <= {*names, *own}
    assert all(isinstance(reason, str) for reason in OTHER_NAMES["no_option"].values())


def test_what_there_is_no_option_for_is_said(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.warmup_ratio: no such option: train\.warmup_steps is a number"):
        load_config(recipe, ["train.warmup_ratio=0.1"])


def test_bad_overrides_and_the_issues_of_the_recipe_come_in_one_message(tmp_path: Path) -> None:
    """Guards against one issue per start: the first bad override hid all others."""
    path = tmp_path / "recipe.yaml"
    path.write_text("family: higgs_audio_v2\nmodel: {path: base}\nlora: {r: 4}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["train.lr=1", "epochs", "train.epochs=-1", "train.seed=1"])
    message = str(caught.value)
    assert message.startswith(f"{path}, with 4 override(s): 4 issue(s)")
    for part in ("train.lr:", "override 'epochs':", "train.epochs:", "lora.r:"):
        assert part in message, message


def test_a_shipped_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file comes first, and an unknown name says which there are."""
    monkeypatch.chdir(tmp_path)
    shipped = load_config(shipped_recipes()["paper_r64"])
    assert load_config(Path("paper_r64")) == load_config(Path("paper_r64.yaml")) == shipped
    (tmp_path / "paper_r64").write_text(yaml.safe_dump(SMALLEST), encoding="utf-8")
    assert load_config(Path("paper_r64")).model.path == "base"
    for unknown in ("paper_r65", "nowhere/paper_r64"):
        with pytest.raises(ConfigError, match=r"cannot read the recipe.*higgs_3b_full, higgs_3b_lora, .*paper_r64"):
            load_config(Path(unknown))


def test_two_evaluation_sets_are_refused_naming_both(recipe: Path) -> None:
    """The original pipeline's default split of 0.005 silently disabled `--eval_data_file`."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, ["data.eval=held_out.json", "data.validation_split=0.1"])
    for part in ("data.eval (held_out.json)", "data.validation_split (0.1)", "remove one"):
        assert part in str(caught.value)
    for alone in ("data.eval=held_out.json", "data.validation_split=0.1"):
        load_config(recipe, [alone])


def test_freezing_beside_lora_is_refused(recipe: Path) -> None:
    """With LoRA the option would do nothing, and a flag that does nothing is refused."""
    with pytest.raises(ConfigError, match=r"train\.freeze"):
        load_config(recipe, ["train.freeze=.*embed.*"])
    assert load_config(recipe, ["train.freeze=.*embed.*", "lora.enabled=false"]).train.freeze == ".*embed.*"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read the recipe"),
        (b"family: [", "not valid YAML"),
        (b"- a\n- b\n", "found list"),
        (b"", "found NoneType"),
        (b"family: \xff\xfe", "not valid YAML"),
        (b"family: higgs_audio_v2\nmodel: base\n", "model"),
    ],
)
def test_a_broken_recipe_is_refused_by_name(tmp_path: Path, content: bytes | None, part: str) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path)) and part in str(caught.value)


def test_the_cache_lies_beside_the_run_unless_named(recipe: Path) -> None:
    config = load_config(recipe, ["output_dir=/runs/one"])
    assert config.cache_dir == Path("/runs/speechtune-cache")
    assert load_config(recipe, ["output_dir=/runs/one", "data.cache_dir=/fast"]).cache_dir == Path("/fast")


def test_an_option_of_two_types_has_one_issue() -> None:
    """Guards against an issue per type, named after pydantic's inner workings ("batch.tokens.constrained-int")."""
    two_types = {
        (section, name)
        for section, info in RunConfig.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        for name, field in info.annotation.model_fields.items()
        if get_origin(field.annotation) in (Union, UnionType)
        and len(set(get_args(field.annotation)) - {type(None)}) > 1
    }
    assert two_types == OPTIONS_OF_TWO_TYPES
    with pytest.raises(ConfigError) as caught:
        build_config({**SMALLEST, "batch": {"tokens": 0}, "train": {"gradient_checkpointing": "maybe"}}, "test")
    boolean = "Input should be a valid boolean, unable to interpret input, or 'auto' (got 'maybe')"
    assert str(caught.value).splitlines()[1:] == [
        f"  train.gradient_checkpointing: {boolean}",
        "  batch.tokens: Input should be greater than or equal to 1, or 'auto' (got 0)",
    ]


def test_data_is_a_path_or_a_list_of_them(recipe: Path) -> None:
    assert load_config(recipe, ["data.train=a.jsonl"]).data.train == Path("a.jsonl")
    config = load_config(recipe, ["data.train=[a.jsonl, b/]", "data.eval=[c.csv]"])
    assert (config.data.train, config.data.eval) == ((Path("a.jsonl"), Path("b")), (Path("c.csv"),))
    again = build_config(yaml.safe_load(config.to_yaml()), "again")
    assert again.data == config.data
    for wrong in ("[]", "[1]", "3", "{a: b}"):
        with pytest.raises(ConfigError) as caught:
            load_config(recipe, [f"data.train={wrong}"])
        assert len(str(caught.value).splitlines()) == 2 and "data.train: Input" in str(caught.value)
