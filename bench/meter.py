"""How both sides are timed: by one hook that torch calls behind every optimizer step."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic, process_time

from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import logging as transformers_logging


@dataclass(frozen=True)
class Rate:
    """Real tokens per second of wall time, and per second of this process's CPU time."""

    wall: float
    cpu: float


@dataclass
class Meter:
    """Time and real tokens at the end of every optimizer step."""

    tokens: int = 0
    marks: list[tuple[float, float, int]] = field(default_factory=list)

    def mark(self, *_: object) -> None:
        """Called by torch when an optimizer has stepped."""
        self.marks.append((monotonic(), process_time(), self.tokens))

    def rate(self) -> Rate:
        """From the end of the first step to the end of the last."""
        (wall, cpu, tokens), (last_wall, last_cpu, last_tokens) = self.marks[0], self.marks[-1]
        return Rate((last_tokens - tokens) / (last_wall - wall), (last_tokens - tokens) / (last_cpu - cpu))


@contextmanager
def metered() -> Iterator[Meter]:
    """Watch the optimizers of this process."""
    meter = Meter()
    handle = register_optimizer_step_post_hook(meter.mark)
    try:
        yield meter
    finally:
        handle.remove()
        gc.collect()
        for state in (PartialState, AcceleratorState, GradientState):  # else the next run would find this one's
            state._reset_state()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the runs' own lines off the table."""
    logger = logging.getLogger("speechtune")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
