"""A cache of keys and values for generation in batches that is not copied for every position."""

from typing import Any

import torch
from torch import nn
from transformers import DynamicLayer

ROOM = 64  # positions


class GrowingLayer(DynamicLayer):
    """A layer of the cache with room for the next positions; transformers' own copies all it holds for each.

    Shapes: B samples, H heads, S positions, E numbers of a head.
    """

    _room: tuple[torch.Tensor, ...] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states (B, H, S, E); returns all of them, as views."""
        start, added = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._room is None or end > self._room[0].shape[-2]:
            held: tuple[Any, ...] = (self.keys, self.values) if start else tuple(states[:, :, :0] for states in added)
            self._room = tuple(nn.functional.pad(states, (0, 0, 0, end - start + ROOM)) for states in held)
        for room, states in zip(self._room, added, strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these samples."""
        super().batch_select_indices(indices)
        self._room = None
