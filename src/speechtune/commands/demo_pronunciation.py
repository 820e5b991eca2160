"""The demonstration of pronunciation assessment, measured on speakers that were not trained on.

The recordings are synthetic voices with made errors and scores by a rule (see the README beside them), so the figures
tell whether the pipeline learns; of people they tell nothing.
"""

from pathlib import Path

from rich.console import Console

from speechtune.commands.score import print_score, read_requests
from speechtune.config import RunConfig
from speechtune.families import build_config, family_part
from speechtune.inference.evaluate_pronunciation import evaluate_pronunciation
from speechtune.inference.load import open_adapter
from speechtune.inference.score import assessor, score_samples
from speechtune.lora.files import FOLDER_NAME
from speechtune.tasks.pronunciation.evaluation import print_evaluation
from speechtune.training.run import Outcome

RECORDINGS = Path(__file__).parents[1] / "assets" / "demo-pronunciation"
MAX_NEW_TOKENS = 160


def write_data(directory: Path) -> Path:
    """The shipped recordings; nothing has to be written."""
    return RECORDINGS


def demo_config(family: str, data: Path, directory: Path) -> RunConfig:
    """The demo's recipe: a new adapter on language model and speech encoder of the embedded base, both tasks."""
    return build_config(
        {
            "family": family,
            "output_dir": directory / "run",
            "model": family_part(family, "tiny").make_base(directory / "base", ()),
            "data": {"train": data / "train", "cache_dir": directory / "cache"},
            "lora": {"rank": 32, "alpha": 64, "dropout": 0.05, "targets": "language+audio"},
            "train": {"max_steps": 240, "batch_size": 12, "learning_rate": 2e-3, "warmup_steps": 20},
            "evaluate": {"every_steps": 120, "prompts": 12},
            "checkpoint": {"every_steps": 120, "keep_last": 1},
            "tracking": {"log_every_steps": 20},
        },
        "demo",
    )


def measure(outcome: Outcome, data: Path, merged: Path, console: Console) -> list[tuple[str, str]]:
    """Score one recording, evaluate the adapter on the test speakers, and print both; no rows for the table."""
    config = outcome.job.config
    adapter = config.output_dir / FOLDER_NAME
    _, family, model = assessor(None, open_adapter(adapter))
    sample, *_ = read_requests([], None, data / "test")
    (score,) = score_samples(family, model, [sample], config.cache_dir, max_tokens=MAX_NEW_TOKENS)
    print_score(score, console)
    report = evaluate_pronunciation(
        data / "test",
        train=data / "train",
        adapter=adapter,
        out=config.output_dir / "evaluation",
        cache_dir=config.cache_dir,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    print_evaluation(report, console)
    console.print("(synthetic voices with scores by a rule: these figures tell of the pipeline, not of people)")
    return []
