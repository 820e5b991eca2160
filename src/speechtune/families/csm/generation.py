"""Generation with CSM's two decoders, both set alike, and left as they were."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CsmConfig

from speechtune.errors import ConfigError
from speechtune.families.csm.configuration import codes_of
from speechtune.families.csm.forward import embed
from speechtune.families.layers.draws import seeded
from speechtune.types import GenerationOptions

MAX_FRAMES = 375  # 30 seconds; the released generation config says 125, which cuts whatever is longer than 10


@torch.no_grad()
def generate_rows(
    base: Any, inputs: Mapping[str, torch.Tensor], config: CsmConfig, options: GenerationOptions
) -> torch.Tensor:
    """Rows (B, F, K) that go on from prompts padded on the left; samples that end before the last go on with noise."""
    sampling = sampling_of(options)
    # What Mimi has no entry for: no such code may come out, for decoding would fail.
    sampling["suppress_tokens"] = list(range(codes_of(config), config.vocab_size))
    room = config.max_position_embeddings - inputs["input_ids"].shape[1]
    cap = options.max_new_tokens or max(1, min(MAX_FRAMES, room))
    kept = copy.deepcopy(base.depth_decoder.generation_config)  # transformers leaves the options for it on the model
    try:
        with seeded(options, base):
            return base.generate(
                inputs_embeds=embed(base, inputs),
                attention_mask=inputs["attention_mask"],
                max_new_tokens=cap,
                **sampling,
                **{f"depth_decoder_{name}": value for name, value in sampling.items()},
            )
    finally:
        base.depth_decoder.generation_config = kept


def sampling_of(options: GenerationOptions) -> dict[str, Any]:
    """Options for either decoder; temperature 0 is greedy in both, which transformers' `do_sample=False` alone is not.

    Raises ConfigError: options that CSM does not have.
    """
    if options.ras_win_len is not None or options.ras_win_max_num_repeat is not None:
        raise ConfigError("csm has no repetition-aware sampling: leave ras_win_len and ras_win_max_num_repeat out")
    if options.temperature == 0:
        return {"do_sample": False}
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    return {"do_sample": True} | {name: value for name, value in given.items() if value is not None}
