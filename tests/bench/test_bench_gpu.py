"""The GPU bench, scaled down: it runs, its two sides compute the same loss, and its groups add up."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flop_rules import flop_rules
from flops import count_flops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speechtune.families.layers import ops as fast
from speechtune.families.layers.decoder import make_fast
from speechtune.lora.apply import apply_lora
from speechtune.precision import PrecisionPlan

BENCH = Path(__file__).parents[2] / "bench"
FP32 = PrecisionPlan("fp32", torch.device("cpu"), torch.float32, None, False, "test")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_setup")


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_profile")


@pytest.mark.parametrize("family", ["higgs_audio_v2", "phi4_multimodal"])
def test_the_script_runs_on_a_cpu(family: str, setup: Any, tmp_path: Path) -> None:
    bench = importlib.import_module("gpu")
    options = f"--device cpu --scale tiny --passes 1 --budgets 300 --lora attention --lengths mixed --families {family}"
    bench.main([*options.split(), "--output", str(tmp_path)])
    (file,) = tmp_path.glob("gpu-cpu-*.json")
    result = json.loads(file.read_text())
    assert result["torch"] == torch.__version__ and result["peak_dense_bf16_flops"] is None
    assert [row["side"] for row in result["rows"]] == ["packed", "padded", "peer"]
    for row in result["rows"]:
        assert row["tokens_per_second"] > 0 and row["audio_seconds_per_second"] > 0 and not row["error"]
        assert row["mfu_4n"] is None and row["peak_gib"] is None, "no peak is known, and no GPU memory is there"
        assert sum(row["breakdown"].values()) == pytest.approx(1.0) and row["breakdown"]["matmul"] > 0
    assert len({row["flops_4n"] for row in result["rows"]}) == 1, "the sides do not train the same tokens"
    assert file.with_suffix(".md").read_text().count(f"| {family} |") == 6


@pytest.mark.parametrize("ours", [{"packing": True, "fast": True}, {"packing": False, "fast": False}], ids=str)
@pytest.mark.parametrize(("name", "count"), [("higgs_audio_v2", 3), ("phi4_multimodal", 1)])
def test_both_sides_compute_the_same_loss(name: str, count: int, ours: dict[str, bool], setup: Any) -> None:
    """Of Phi-4 one sample alone: the native encoder lets padding leak into what it is batched with."""
    family = setup.make_family(name, tiny=True, **ours)
    peer = setup.make_family(name, tiny=True, packing=False, fast=False)
    models = [setup.make_model(side, FP32, "default").eval() for side in (family, peer)]
    items = setup.make_samples(family, [140, 200, 170][:count])
    batch = family.collate(items)
    head = family.heads[0]
    found = family.losses(models[0], batch).sums[head] / batch.target_counts[head]
    theirs = setup.peer_loss(models[1], setup.peer_inputs(peer, items))
    torch.testing.assert_close(theirs, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["higgs_audio_v2", "phi4_multimodal"])
def test_the_model_is_whole_and_its_buffers_are_those_of_a_loaded_one(name: str, setup: Any) -> None:
    family = setup.make_family(name, tiny=True, packing=True, fast=True)
    plan = PrecisionPlan("bf16", torch.device("cpu"), torch.bfloat16, torch.bfloat16, False, "test")
    model = setup.make_model(family, plan, "default").get_base_model()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    wanted = dict(type(model)(family.model_config).named_buffers())
    found = dict(model.named_buffers())
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize(
    ("name", "layers", "attention"),
    [("higgs_audio_v2", 28, 3072 * (2 * 3072 + 2 * 1024)), ("phi4_multimodal", 32, 3072 * (5120 + 3072))],
)
def test_operations_at_released_dimensions(
    name: str, layers: int, attention: int, setup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device torch counts a step of the real size without computing it."""
    monkeypatch.setattr(fast, "MOST_POSITIONS", 0)  # nor a CPU's attention in blocks
    family = setup.make_family(name, tiny=False, packing=True, fast=True)
    model = apply_lora(make_fast(family.skeleton(), family.fast_layers), family, family.config.lora, seed=0).train()
    batch = family.collate(setup.make_samples(family, [200, 300, 700]))
    rules = flop_rules(family, model, batch)
    assert count_flops(model, rules, batch.num_tokens).active_parameters == layers * (attention + 3 * 3072 * 8192)
    pairs = sum(length**2 for length in batch.lengths)  # torch counts all
    rules = tuple(replace(rule, pairs=pairs) if rule.part == "attention scores" else rule for rule in rules)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.stack(list(family.losses(model, batch.to("meta")).sums.values())).sum().backward()
    assert count_flops(model, rules, batch.num_tokens).computed_flops == counter.get_total_flops()


@pytest.mark.parametrize("name", ["higgs_audio_v2", "phi4_multimodal"])
def test_a_fast_step_reads_nothing_back(name: str, setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would have to be waited for is an error on the meta device: the native layers' masks, for one."""

    def step(way: bool) -> None:
        family = setup.make_family(name, tiny=True, packing=True, fast=way)
        model = make_fast(family.skeleton(), family.fast_layers) if way else family.skeleton()
        batch = family.collate(setup.make_samples(family, [150, 200])).to("meta")
        torch.stack(list(family.losses(model, batch).sums.values())).sum().backward()

    step(True)
    if name == "higgs_audio_v2":
        with pytest.raises(NotImplementedError, match="nonzero"):
            step(False)


def test_samples_fill_the_budget_and_none_is_lost(setup: Any) -> None:
    family = setup.make_family("higgs_audio_v2", tiny=True, packing=True, fast=True)
    lengths = setup.make_lengths("mixed", 4096)
    samples = setup.make_samples(family, lengths)
    assert [sample.num_tokens for sample in samples] == lengths and min(lengths) < 400 and max(lengths) > 1500
    for packed in (True, False):
        batches = setup.cut(samples, 4096, packed=packed)
        sizes = [[sample.num_tokens for sample in batch] for batch in batches]
        assert sorted(length for size in sizes for length in size) == sorted(lengths)
        assert all((sum(size) if packed else max(size) * len(size)) <= 4096 for size in sizes)


def test_kernels_are_grouped(profile: Any) -> None:
    expected = {
        "attention": [
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>",
            "fmha_cutlassF_bf16_aligned",
        ],
        "matmul": ["nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "ampere_bf16_s16816gemm_bf16_128x128", "aten::mm"],
        "copy/index": [
            "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>",
            "Memcpy HtoD (Pinned -> Device)",
            "void at::native::index_elementwise_kernel<128, 4>",
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized",
        ],
        "elementwise/norm": [
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "_rms_norm_forward_kernel",
            "void at::native::reduce_kernel<512, 1>",
        ],
        "optimizer": [
            "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata, FusedAdamMathFunctor>"
        ],
        "other": ["something_new"],
    }
    for group, names in expected.items():
        assert {name: profile.group_of(name) for name in names} == dict.fromkeys(names, group)


def test_a_breakdown_adds_up_with_overlap_and_idle_time(profile: Any) -> None:
    kernels = [("nvjet_a", 0, 40), ("Memcpy HtoD", 30, 50), ("nvjet_b", 70, 80)]
    shares = profile.breakdown(kernels, 100)
    assert shares["matmul"] == pytest.approx(0.5) and shares["copy/index"] == pytest.approx(0.1)
    assert shares["idle"] == pytest.approx(0.4) and sum(shares.values()) == pytest.approx(1.0)


def test_kernels_of_a_gpu_profile_are_kept_and_nothing_else(profile: Any) -> None:
    """Operators on the CPU, and annotations that span many kernels, would count their time twice."""

    def event(name: str, device: Any, annotation: bool = False) -> SimpleNamespace:
        times = SimpleNamespace(start=1.0, end=2.0)
        return SimpleNamespace(name=name, device_type=device, time_range=times, is_user_annotation=annotation)

    gpu, cpu = profile.DeviceType.CUDA, profile.DeviceType.CPU
    events = [
        event("nvjet", gpu),
        event("aten::mm", cpu),
        event("Optimizer.step#AdamW.step", gpu),
        event("x", gpu, True),
    ]
    profiler = SimpleNamespace(events=lambda: events)
    assert profile.intervals(profiler, torch.device("cuda")) == [("nvjet", 1.0, 2.0)]


def test_what_does_not_fit_is_a_row_too(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = importlib.import_module("gpu")
    family = setup.make_family("higgs_audio_v2", tiny=True, packing=True, fast=True)
    model = setup.make_model(family, FP32, "default")
    work = bench.make_work(family, model, FP32, "packed", ("equal", 600))

    def measure(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "measure", measure)
    row = bench.measure_row(("higgs_audio_v2", "all", "equal", 600, "packed"), work, model, FP32.device, 1)
    assert row.error == "out of memory" and row.tokens_per_second is row.mfu_4n is None
    assert "| out of memory | – | – | – |" in bench.table([row]) and "| – |" in bench.breakdown_table([row])
