"""On a CUDA device: the layouts and forward passes agree in bf16, nothing waits inside a step, and a step is measured.

Two layers of the released width. `pytest -m gpu tests/gpu/test_speed.py`
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from speechtune.families.layers.kernels import rms_norm, silu_mul
from speechtune.lora.apply import trainable
from speechtune.precision import plan_precision
from speechtune.training.job import Objective
from speechtune.types import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DEVICE = "cuda"
FAMILIES = ["higgs_audio_v2", "phi4_multimodal"]
LENGTHS = [150, 420, 333]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("gpu_setup")


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def family_of(setup: Any, name: str, *, packing: bool, fast: bool) -> Any:
    family = setup.make_family(name, tiny=False, packing=packing, fast=fast)
    family.model_config.num_hidden_layers = 2
    return family


def step_of(family: Any, model: nn.Module, batch: Batch) -> tuple[dict[str, float], torch.Tensor]:
    """Loss sums, and all gradients of the adapter as one vector."""
    model.zero_grad(set_to_none=True)
    loss, sums = Objective(model, family, plan_precision(), {})(batch, batch.target_counts)
    loss.backward()
    grads = [parameter.grad for parameter in trainable(model).values() if parameter.grad is not None]
    return {head: float(value) for head, value in sums.items()}, torch.cat([grad.flatten().double() for grad in grads])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("packing", "fast"), [(True, True), (True, False), (False, True)])
def test_layouts_and_forwards_agree(name: str, packing: bool, fast: bool, setup: Any) -> None:
    """Against the padded batch through the native forward; in bf16 sums are taken in another order."""
    sides = [family_of(setup, name, packing=p, fast=f) for p, f in ((False, False), (packing, fast))]
    results = []
    for family in sides:
        model = setup.make_model(family, plan_precision(), "default").eval()  # no dropout
        torch.manual_seed(1)
        for parameter in trainable(model).values():
            nn.init.normal_(parameter, std=0.02)  # lora_B starts at zero, and lora_A would get no gradient
        batch = family.collate(setup.make_samples(family, LENGTHS)).to(DEVICE)
        results.append(step_of(family, model, batch))
    (wanted, wanted_grad), (found, grad) = results
    assert found == pytest.approx(wanted, rel=5e-3)
    assert float(nn.functional.cosine_similarity(grad, wanted_grad, dim=0)) > 0.995
    assert float(grad.norm()) == pytest.approx(float(wanted_grad.norm()), rel=2e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_waits_for_the_device_inside_a_step(name: str, setup: Any) -> None:
    family = family_of(setup, name, packing=True, fast=True)
    model = setup.make_model(family, plan_precision(), "default")
    batch = family.collate(setup.make_samples(family, LENGTHS)).to(DEVICE)
    objective = Objective(model, family, plan_precision(), {})
    objective(batch, batch.target_counts)[0].backward()  # libraries prepare themselves in the first step
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(batch, batch.target_counts)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bench_measures(name: str, setup: Any) -> None:
    bench = importlib.import_module("gpu")
    family = family_of(setup, name, packing=True, fast=True)
    plan = plan_precision()
    model = setup.make_model(family, plan, "default")
    work = bench.make_work(family, model, plan, "packed", ("mixed", 2048))
    row = bench.measure_row((name, "default", "mixed", 2048, "packed"), work, model, plan.device, 1)
    assert row.tokens_per_second > 0 and row.peak_gib > 1 and not row.error
    assert row.mfu_4n is None or 0 < row.mfu_4n < 1
    assert sum(row.breakdown.values()) == pytest.approx(1.0)
    assert row.breakdown["matmul"] > row.breakdown["other"], "most kernels' names are known to the table"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_computes_the_same(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random() -> torch.Tensor:
        return torch.randn(64, 3072, device=DEVICE, generator=generator).to(dtype)

    inputs, weight = [random() for _ in range(3)], random()[0]
    found = []
    for kernels in ("torch", "liger"):
        hidden, gate, up = (tensor.clone().requires_grad_() for tensor in inputs)
        outputs = [rms_norm(hidden, weight, 1e-5, kernels), silu_mul(gate * 1, up * 1, kernels)]
        torch.stack([output.float().square().sum() for output in outputs]).sum().backward()
        found.append([tensor.detach().float() for tensor in (*outputs, hidden.grad, gate.grad, up.grad)])  # type: ignore[union-attr]
    for plain, liger in zip(*found, strict=True):
        assert float((plain - liger).norm() / plain.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)
