"""Native generation: rows of codes that go on from padded prompts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import Cache

from speechtune.families.higgs_audio_v2.conditioning import NAME, conditioned
from speechtune.families.layers.draws import seeded
from speechtune.families.layers.growing_cache import GrowingLayer
from speechtune.lora.apply import plain_model
from speechtune.types import GenerationOptions

MAX_NEW_TOKENS = 2048  # 82 seconds
FEWER = 0.8  # ended samples are left out when no more than this share runs: it costs a copy of the others' cache


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
    cap, num_samples = options.max_new_tokens or MAX_NEW_TOKENS, len(inputs["input_ids"])
    inputs, heard = ({name: value.to(base.device) for name, value in part.items()} for part in (inputs, heard))
    cache = Cache(layer_class_to_replicate=GrowingLayer)
    with conditioned(base, heard), seeded(options, base), ended_left_out(base, cache, num_samples):
        rows = model.generate(**inputs, max_new_tokens=cap, past_key_values=cache, **sampling)
    return rows[:, max_rows:].cpu().numpy()


def begin_once(base: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the decoder that are left when the beginning that all prompts share, a voice, is in the cache.

    It is computed for one of them. Native: `input_ids` (B, S) and `position_ids` padded on the left, rows (B, R, K).
    """
    ids_BS, rows_BRK, mask_BS = inputs["input_ids"], inputs.get("audio_input_ids"), inputs.get("attention_mask")
    if len(ids_BS) == 1 or rows_BRK is None or inputs.get("position_ids") is None or hasattr(base, NAME):
        return inputs
    length, num_rows, device = ids_BS.shape[1], rows_BRK.shape[1], ids_BS.device
    places = torch.arange(length, device=device)
    pads_B1 = torch.zeros_like(ids_BS[:, :1]) if mask_BS is None else (mask_BS == 0).sum(dim=1, keepdim=True)
    ids_BS = ids_BS.gather(1, (places + pads_B1).clamp(max=length - 1))  # padded on the right, for now
    is_row_BS = (ids_BS == base.config.audio_token_id) | (ids_BS == base.config.audio_delay_token_id)
    same_rows = (rows_BRK == rows_BRK[:1]).all(dim=2).all(dim=0).long().cumprod(dim=0).sum()
    same_S = (ids_BS == ids_BS[:1]).all(dim=0) & (is_row_BS[0].cumsum(dim=0) <= same_rows)
    shared = min(int(same_S.long().cumprod(dim=0).sum()), length - int(pads_B1.max()) - 1)
    if shared <= 0:
        return inputs
    first, num_first = Cache(layer_class_to_replicate=GrowingLayer), int(is_row_BS[0, :shared].sum())
    base.model.forward(
        input_ids=ids_BS[:1, :shared],
        position_ids=places[None, :shared],
        audio_input_ids=rows_BRK[:1, :num_first],
        audio_input_ids_mask=torch.ones(1, num_first, dtype=torch.bool, device=device),
        past_key_values=first,
        use_cache=True,
    )
    cached = int(pads_B1.min()) + shared
    taken_BS = (places[:cached] - pads_B1).clamp(0, shared - 1)
    for number, layer in enumerate(cast(list[Any], first.layers)):
        states = (held[0][:, taken_BS].transpose(0, 1) for held in (layer.keys, layer.values))
        inputs["past_key_values"].update(*states, number)
    done_B1 = (is_row_BS & (places < cached - pads_B1)).sum(dim=1, keepdim=True)
    left_BR = inputs["audio_input_ids_mask"] & (torch.arange(num_rows, device=device) >= done_B1)
    rest = {name: inputs[name][:, cached:] for name in ("input_ids", "position_ids")}
    return inputs | rest | {"audio_input_ids_mask": left_BR}


@contextmanager
def ended_left_out(base: Any, cache: Cache, num_samples: int) -> Iterator[None]:
    """While it lasts, the decoder computes those samples of a batch that run; the hidden states of the others are zero.

    transformers computes all of them until the last one ends, and has those that ended go on with rows of EOS.
    """
    eos = base.config.audio_stream_eos_id
    running = torch.arange(num_samples, device=base.device)

    def take(module: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        nonlocal running
        if inputs.get("input_ids") is not None:
            return args, begin_once(base, inputs)
        goes_on = (inputs["audio_input_ids"][running, -1] != eos).any(dim=-1).nonzero()[:, 0]
        if 0 < len(goes_on) <= FEWER * len(running):
            cache.batch_select_indices(goes_on)
            running = running[goes_on]
        if len(running) == num_samples:
            return None
        each = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and len(v) == num_samples}
        return args, inputs | {name: values[running] for name, values in each.items()}

    def put_back(module: nn.Module, args: Any, outputs: Any) -> None:
        if len(running) < num_samples:
            states = outputs.last_hidden_state
            everywhere = states.new_zeros(num_samples, *states.shape[1:])
            outputs.last_hidden_state = everywhere.index_copy(0, running, states)

    decoder: nn.Module = base.model
    handles = (decoder.register_forward_pre_hook(take, with_kwargs=True), decoder.register_forward_hook(put_back))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
