"""Random draws in generation: from one generator for a batch, or from one for each of its rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from speechtune.types import GenerationOptions


class RowDraws(TorchFunctionMode):
    """Inside a `with` block each row of a batch is drawn as it would be alone after `torch.manual_seed` of its seed.

    transformers draws for all rows in one call, from one generator, so that a row's draws depend on its mates. Here
    such a call becomes one for each row. Its distributions lie in the order of the rows, as many of each; of those that
    repetition-aware sampling draws again (`logits_BKV[mask_BK]`, with replacement) the mask says whose they are.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.redrawn: torch.Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and self._is_row_mask(args[1]):
            self.redrawn = args[1]
        elif func in (torch.multinomial, torch.Tensor.multinomial) and "generator" not in kwargs:
            sizes = [len(args[0]) // len(self.generators)] * len(self.generators)
            if kwargs.get("replacement") and self.redrawn is not None:
                sizes = self.redrawn.sum(dim=1).tolist()
            parts = zip(args[0].split(sizes), self.generators, strict=True)
            return torch.cat([torch.multinomial(part, *args[1:], generator=one, **kwargs) for part, one in parts])
        return func(*args, **kwargs)

    def _is_row_mask(self, index: object) -> bool:
        if not isinstance(index, torch.Tensor) or index.dtype != torch.bool:
            return False
        return index.ndim == 2 and len(index) == len(self.generators)


@contextmanager
def seeded(options: GenerationOptions, model: PreTrainedModel) -> Iterator[None]:
    """Where a batch is generated: its draws start from one seed, or those of each row from its own.

    The rows' own are drawn between the forward passes of `model`: in them the override would cost time at every call.
    """
    if not options.seeds:
        torch.manual_seed(options.seed)
        yield
        return
    draws = RowDraws(options.seeds, model.device)
    with ExitStack() as between, ExitStack() as hooks:

        def leave(*_: object) -> None:
            between.close()

        def enter(*_: object) -> None:
            between.enter_context(draws)

        hooks.callback(model.register_forward_pre_hook(leave).remove)
        hooks.callback(model.register_forward_hook(enter).remove)
        yield
