"""Sharded tensors through guards, fingerprints and saving, on one rank; runs on two are in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from speechtune.errors import TrainingError
from speechtune.tensors import checksums, gather, is_sharded, shard_like, tensors_fingerprint
from speechtune.training import guards
from speechtune.training.checkpoint import cpu_copy, cut_optimizer_state
from speechtune.training.distributed import check_sharded, shard

ACCELERATOR: Any = SimpleNamespace(num_processes=1, device=torch.device("cpu"))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3).requires_grad_(False).bfloat16()
        self.lora_B = nn.Linear(3, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x.bfloat16()).float() + self.lora_B(x)


class Model(nn.Module):
    _no_split_modules = ("Layer",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).sum()


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    yield
    dist.destroy_process_group()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return shard(Model(), ACCELERATOR)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    model(torch.ones(2, 3)).backward()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_a_sharded_model_has_the_fingerprint_of_the_whole_one(model: nn.Module) -> None:
    torch.manual_seed(0)
    plain = Model()
    assert is_sharded(model) and not is_sharded(plain)
    assert tensors_fingerprint(model.named_parameters()) == tensors_fingerprint(plain.named_parameters())
    assert checksums(dict(model.named_parameters())) == checksums(dict(plain.named_parameters()))


def test_what_stayed_whole_is_named() -> None:
    with pytest.raises(TrainingError, match=r"6 of 6 parameters are not sharded over 1 ranks \(first layers\.0\.base"):
        check_sharded(dict(Model().named_parameters()), 1)
    parameters = dict(shard(Model(), ACCELERATOR).named_parameters())
    held, total = check_sharded(parameters, 1)
    assert held == total == sum(p.numel() * p.element_size() for p in Model().parameters())
    with pytest.raises(TrainingError, match="not sharded over 2 ranks"):
        check_sharded(parameters, 2)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"no repeated blocks .* use speed\.parallel=ddp"):
        shard(nn.Linear(2, 2), ACCELERATOR)


def test_guards_name_what_is_wrong_in_shards(model: nn.Module) -> None:
    parameters = trained(model)
    one, other = parameters.values()
    assert isinstance(one.grad, DTensor)
    guards.check_reached(parameters, "step 1")
    guards.check_finite(parameters, "step 1", ["a"])
    with torch.no_grad():
        other.grad.zero_()  # type: ignore[union-attr]
        one.grad.to_local()[0, 0] = torch.nan
        one.to_local()[0, 0] = torch.inf
    with pytest.raises(TrainingError, match=r"reached 1 lora_B \(layers\.1\.lora_B"):
        guards.check_reached(parameters, "step 1")
    with pytest.raises(TrainingError, match=r"non-finite gradients in 1 parameters \(layers\.0\.lora_B"):
        guards.check_gradients(parameters, float("nan"), "step 1", ["a"])
    with pytest.raises(TrainingError, match=r"layers\.0\.lora_B\.weight holds infinity"):
        guards.check_finite(parameters, "step 1", ["a"])


def test_tensors_are_gathered_and_cut_again(model: nn.Module) -> None:
    tensor = next(model.parameters())
    copied = cpu_copy({"a": [tensor], "b": 1})
    assert not isinstance(copied["a"][0], DTensor) and torch.equal(copied["a"][0], gather(tensor))
    assert isinstance(cpu_copy(tensor, keep=False), DTensor)
    again = shard_like(copied["a"][0], tensor)
    assert isinstance(again, DTensor) and again.placements == tensor.placements  # type: ignore[attr-defined]
    assert shard_like(torch.ones(()), tensor).shape == () and not isinstance(
        shard_like(torch.ones(()), tensor), DTensor
    )


def test_the_state_of_an_optimizer_is_cut_as_its_parameters_are(model: nn.Module) -> None:
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values())
    optimizer.step()
    saved = cpu_copy(optimizer.state_dict())
    assert not any(isinstance(value, DTensor) for moments in saved["state"].values() for value in moments.values())
    fresh = torch.optim.AdamW(parameters.values())
    fresh.load_state_dict(cut_optimizer_state(saved, fresh))
    moments = fresh.state[next(iter(parameters.values()))]
    assert isinstance(moments["exp_avg"], DTensor) and not isinstance(moments["step"], DTensor)
    assert torch.equal(gather(moments["exp_avg"]), saved["state"][0]["exp_avg"])
