"""The system messages and scenes a model was trained with, beside its weights: asked otherwise it speaks worse."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from speechtune.errors import AdapterError
from speechtune.types import Sample

log = logging.getLogger("speechtune")

PROMPTS_NAME = "prompts.json"
MAX_KEPT = 16  # different prompts; data with one of its own in every row has none that could be taken
NO_PROMPT = (None, None)


def describe_prompts(samples: Sequence[Sample]) -> str:
    """The content of prompts.json: the most frequent pairs of system message and scene, null where rows have none."""
    counts = Counter((sample.system, sample.scene) for sample in samples)
    kept = [{"system": s, "scene": c, "samples": n} for (s, c), n in counts.most_common(MAX_KEPT)]
    return json.dumps({"prompts": kept, "different": len(counts)}, ensure_ascii=False, indent=1) + "\n"


def as_trained(samples: Sequence[Sample], folder: Path) -> list[Sample]:
    """Prompts with the system message and scene that the model in `folder` was trained with, where they have neither.

    Those that have others are warned of, and left as they are.

    Raises AdapterError: prompts.json is damaged.
    """
    file = folder / PROMPTS_NAME
    if not file.is_file():
        return list(samples)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = [(row["system"], row["scene"]) for row in content["prompts"]]
        complete = content["different"] == len(known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{file}: not readable as the prompts of a training: {error}") from None
    if not known or not complete:
        return list(samples)
    prompts = [(sample.system, sample.scene) for sample in samples]
    if NO_PROMPT in prompts and NO_PROMPT not in known:
        system, scene = known[0]
        log.info("prompts get the system message and scene of the training (%s): %r, %r", file, system, scene)
        samples = [
            replace(sample, system=system, scene=scene) if prompt == NO_PROMPT else sample
            for sample, prompt in zip(samples, prompts, strict=True)
        ]
    other = sorted({repr(prompt) for prompt in prompts if prompt != NO_PROMPT and prompt not in known})
    if other:
        log.warning("%s: trained with system message and scene %s, asked with %s", folder, known[0], other[0])
    return list(samples)
