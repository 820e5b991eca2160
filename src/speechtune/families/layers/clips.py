"""Work on clips, each by itself: a codec that pads clips to a common length changes their codes."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


def map_clips(
    work: Callable[[In], Out],
    items: Sequence[In],
    device: torch.device,
    size: Callable[[In], int] | None = None,
) -> list[Out]:
    """`work` on each item, the largest first where a `size` is given; on a CPU a thread an item, as many as torch has.

    Threads that share one clip wait for each other after every small operation.
    """
    order = sorted(range(len(items)), key=lambda i: 0 if size is None else -size(items[i]))
    ordered, threads = [items[i] for i in order], torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        done = [work(item) for item in ordered]
    else:
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                done = list(pool.map(work, ordered))
        finally:
            torch.set_num_threads(threads)  # threads started later would take the pool's number for the default
    results = dict(zip(order, done, strict=True))
    return [results[i] for i in range(len(items))]
