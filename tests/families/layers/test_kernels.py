"""The fast operations against the native classes of transformers, and against float64."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.higgs_audio_v2 import modeling_higgs_audio_v2 as higgs
from transformers.models.phi4_multimodal import modeling_phi4_multimodal as phi4

from speechtune.config import SpeedConfig
from speechtune.errors import ConfigError
from speechtune.families.layers.kernels import choose_kernels, rms_norm, rope, silu_mul

WIDTH = 96


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def angles(positions: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (1, S, R) as the native classes make them."""
    frequencies = torch.outer(torch.arange(positions).float(), 1e4 ** -torch.linspace(0, 1, width // 2))
    both = torch.cat([frequencies, frequencies], -1)[None]
    return both.cos(), both.sin()


def assert_alike(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("native", [higgs.HiggsAudioV2RMSNorm, phi4.Phi4MultimodalRMSNorm])
def test_norm_is_the_native_one(native: type[nn.Module]) -> None:
    norm = native(WIDTH, eps=1e-5)
    norm.weight.data = random(WIDTH)
    hidden = (3 * random(2, 5, WIDTH)).requires_grad_()
    ours = rms_norm(hidden, norm.weight, 1e-5)
    grads = torch.autograd.grad(ours.square().sum(), [hidden, norm.weight])
    theirs = norm(hidden)
    wanted = torch.autograd.grad(theirs.square().sum(), [hidden, norm.weight])
    assert_alike([ours, *(g / g.norm() for g in grads)], [theirs, *(g / g.norm() for g in wanted)])


def test_bf16_is_no_farther_from_the_truth_than_the_native_classes() -> None:
    norm = higgs.HiggsAudioV2RMSNorm(WIDTH, eps=1e-5).bfloat16()
    norm.weight.data = random(WIDTH, dtype=torch.bfloat16)
    hidden = random(500, WIDTH, dtype=torch.bfloat16)
    exact = norm.weight.double() * hidden.double() * (hidden.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = rms_norm(hidden, norm.weight, 1e-5), norm(hidden)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - exact).norm() <= (theirs - exact).norm()
    query, key = random(1, 3, 40, WIDTH, dtype=torch.bfloat16), random(1, 2, 40, WIDTH, dtype=torch.bfloat16)
    cos, sin = (value.bfloat16() for value in angles(40, WIDTH))
    exact = higgs.apply_rotary_pos_emb(query.double(), key.double(), cos.double(), sin.double())
    pairs = (rope(query, key, cos, sin), higgs.apply_rotary_pos_emb(query, key, cos, sin), exact)
    for one, other, truth in zip(*pairs, strict=True):
        assert (one - truth).norm() <= (other - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_unit_is_the_native_one(dtype: torch.dtype) -> None:
    mlp = higgs.HiggsAudioV2MLP(higgs.HiggsAudioV2Config(hidden_size=WIDTH, intermediate_size=2 * WIDTH)).to(dtype)
    hidden = random(7, WIDTH, dtype=dtype)
    ours = mlp.down_proj(silu_mul(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    assert torch.equal(ours, mlp(hidden))


@pytest.mark.parametrize(("module", "rotated"), [(higgs, WIDTH), (phi4, WIDTH), (phi4, 72)])
def test_rotary_embedding_is_the_native_one(module: object, rotated: int) -> None:
    """Phi-4 turns only the first part of each head."""
    query, key = random(2, 4, 9, WIDTH).requires_grad_(), random(2, 2, 9, WIDTH).requires_grad_()
    cos, sin = angles(9, rotated)
    before = query.detach().clone()
    ours = rope(query, key, cos, sin)
    theirs = module.apply_rotary_pos_emb(query, key, cos, sin)  # type: ignore[attr-defined]
    weights = [random(*value.shape) for value in ours]
    grads, wanted = (
        torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, pair, strict=True)), [query, key])
        for pair in (ours, theirs)
    )
    assert_alike([*ours, *grads], [*theirs, *wanted])
    assert torch.equal(query, before)
    packed = rope(query[0].transpose(0, 1), key[0].transpose(0, 1), cos[0], sin[0])
    assert_alike([value.transpose(0, 1) for value in packed], [value[0] for value in ours])


def test_compiled_operations_agree() -> None:
    """For two lengths: the second would compile anew, or be cut to the first's, were lengths taken for constants."""
    for length in (7, 12):
        x = [random(length, WIDTH).requires_grad_() for _ in range(2)]
        weight = random(WIDTH)
        pairs = [(rms_norm(x[0], weight, 1e-5, kernels), silu_mul(*x, kernels)) for kernels in ("compiled", "torch")]
        grads = [torch.autograd.grad(sum(value.square().sum() for value in pair), x) for pair in pairs]
        for ours, theirs in zip([*pairs[0], *grads[0]], [*pairs[1], *grads[1]], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_liger_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels(SpeedConfig(), torch.device("cpu")) == "torch"
    assert choose_kernels(SpeedConfig(compile=True), torch.device("cpu")) == "compiled"
    with pytest.raises(ConfigError, match="need a GPU, this run is on cpu"):
        choose_kernels(SpeedConfig(liger=True), torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'speechtune\[liger\]'"):
        choose_kernels(SpeedConfig(liger=True), torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_kernels(SpeedConfig(liger=True), torch.device("cuda")) == "liger"


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("triton", "liger_kernel")),
    reason="Liger and Triton are not installed: pip install 'speechtune[liger]'",
)
def test_liger_agrees_under_the_interpreter() -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    script = str(Path(__file__).with_name("liger_interpreted.py"))
    output = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert output.returncode == 0, output.stderr
    single, half = (json.loads(line) for line in output.stdout.splitlines())
    for found, tolerance in ((single, 1e-6), (half, 2e-3)):
        errors = [value for name, value in found.items() if name != "dtype"]
        assert len(errors) == 5 and all(error < tolerance for error in errors), found
