"""Native generation: rows of codes that go on from padded prompts."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from speechtune.families.higgs_audio_v2.conditioning import conditioned
from speechtune.families.layers.draws import seeded
from speechtune.lora.apply import plain_model
from speechtune.types import GenerationOptions

MAX_NEW_TOKENS = 2048  # 82 seconds


@torch.no_grad()
def new_rows(
    model: Any, inputs: Mapping[str, torch.Tensor], heard: Mapping[str, torch.Tensor], options: GenerationOptions
) -> np.ndarray:
    """Generated rows (B, R, K) without the prompts' own; samples that ended before the last go on with EOS.

    `inputs` are those of the native class, padded on the left; `heard` are the reference rows among theirs.
    """
    base: Any = plain_model(model)
    max_rows = inputs["audio_input_ids"].shape[1]
    if not max_rows:  # no reference: the native class wants no rows rather than none of them
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    sampling: dict[str, Any] = {"do_sample": False, "ras_win_len": None, "ras_win_max_num_repeat": None}
    if options.temperature != 0:
        names = ("temperature", "top_k", "top_p", "ras_win_len", "ras_win_max_num_repeat")
        given = {name: getattr(options, name) for name in names}
        sampling = {"do_sample": True} | {name: value for name, value in given.items() if value is not None}
    for name in ("ras_win_len", "ras_win_max_num_repeat"):  # a base that does not know them refuses the option
        vars(base.generation_config).setdefault(name, None)
    cap = options.max_new_tokens or MAX_NEW_TOKENS
    inputs, heard = ({name: value.to(base.device) for name, value in part.items()} for part in (inputs, heard))
    with conditioned(base, heard), seeded(options, base.device):
        rows = model.generate(**inputs, max_new_tokens=cap, **sampling)
    return rows[:, max_rows:].cpu().numpy()
