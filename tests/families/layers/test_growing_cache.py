"""The cache with room, beside transformers' own."""

import torch
from transformers import Cache, DynamicCache, DynamicLayer

from speechtune.families.layers.growing_cache import ROOM, GrowingLayer


def test_it_holds_what_the_native_one_holds() -> None:
    """A prompt, more steps than there is room for, then two samples of three, and again as many."""
    draw = torch.Generator().manual_seed(0)
    ours, native = Cache(layer_class_to_replicate=GrowingLayer), DynamicCache()
    assert native.layer_class_to_replicate is DynamicLayer
    lengths = [5, *[1] * (ROOM + 3)]
    for batch_size in (3, 2):
        for length in lengths:
            for layer in range(2):
                keys, values = (torch.randn(batch_size, 2, length, 4, generator=draw) for _ in range(2))
                for found, wanted in zip(
                    ours.update(keys, values, layer), native.update(keys, values, layer), strict=True
                ):
                    assert torch.equal(found, wanted)
            assert ours.get_seq_length() == native.get_seq_length()
        for cache in (ours, native):
            cache.batch_select_indices(torch.tensor([0, batch_size - 1]))
    assert ours.get_seq_length() == 2 * sum(lengths)


def test_a_step_copies_nothing_that_is_held() -> None:
    layer = GrowingLayer()
    keys, _ = layer.update(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2))
    places = {layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))[0].data_ptr() for _ in range(ROOM)}
    assert places == {keys.data_ptr()}
