"""Tables over all knobs: where an option runs, what it contradicts, which settings count."""

import re
from typing import Any

import pytest
import torch
from machine_samples import A100, AMD_AITER, CPU, H100, MI300X, MI350, T4, config, machine

from openpi_opt import runtime
from openpi_opt.errors import RefusedError
from openpi_opt.knobs import BY_NAME
from openpi_opt.knobs.attention import SDPA_DEVICES
from openpi_opt.knobs.blas import LIBRARIES
from openpi_opt.machine import Machine

Raw = dict[str, Any]
NVIDIA = {"T4": T4, "A100": A100, "H100": H100}
AITER = {"gfx942": MI300X, "gfx950": MI350, "gfx1200": machine("gfx1200", AMD_AITER)}
AMD = {**AITER, "gfx90a": machine("gfx90a"), "gfx942 without aiter": machine("gfx942")}
GPUS = {**NVIDIA, **AMD}
ALL = {"CPU": CPU, **GPUS}
VENDORS = {"cpu": ["CPU"], "cuda": [*NVIDIA], "rocm": [*AMD]}
MATRIX_CORES = ["H100", "gfx942", "gfx950", "gfx1200", "gfx942 without aiter"]

FP8: Raw = {"blas": {"backend": "fp8"}}
FP8_PREFIX: Raw = {"blas": {"backend": "fp8", "fp8": {"stages": ["vision", "prefill"]}}}
FP8_AITER: Raw = {"blas": {"backend": "fp8", "fp8": {"gemm": "aiter"}}}
BLAS_AITER: Raw = {"blas": {"backend": "aiter"}}
ELEMENTWISE_AITER: Raw = {"elementwise": {"backend": "aiter"}}
SKINNY: Raw = {"gemm": {"backend": "triton_skinny"}}
DENOISE: Raw = {"attention": {"denoise": "triton"}}
FLOAT32: Raw = {"precision": {"dtype": "float32"}}
TF32: Raw = {"precision": {"dtype": "float32", "tf32": True}}
PAD: Raw = {"blas": {"pad_strides": True}}
SEARCHED: Raw = {"blas": {"algorithm": "searched"}}
RESIDUALS: Raw = {"fusion": {"residuals": True}}
MANUAL: Raw = {"graph": {"mode": "manual"}}
FUSED = dict.fromkeys(("qkv", "gate_up", "vision_qkv", "expert_layer"), True)
EXPERT: Raw = {"fusion": FUSED, **DENOISE, **SKINNY}
FLEXIBLE: Raw = {"workload": {"layout": "flexible"}}
TRITON = dict.fromkeys(("vision", "prefill", "denoise"), "triton")


def variables(**given: object) -> Raw:
    return {"environment": {"variables": given}}


def compiled(mode: str = "default", scope: str = "stage", **inductor: object) -> Raw:
    return {"compile": {"mode": mode, "scope": scope, "inductor": inductor}}


def tunable(**given: object) -> Raw:
    return {"blas": {"tunableop": given}}


RUNS: list[tuple[str, Raw, list[str]]] = [
    *(("blas", {"blas": {"library": x}}, VENDORS[on]) for x, (on, _) in LIBRARIES.items()),
    ("blas", FP8, ["CPU", *MATRIX_CORES]),
    ("blas", FP8_AITER, ["gfx942", "gfx950"]),
    ("blas", BLAS_AITER, [*AITER]),
    ("blas", tunable(mode="tune"), [*AMD]),
    ("blas", PAD, [*ALL]),
    ("blas", SEARCHED, [*NVIDIA]),
    ("elementwise", ELEMENTWISE_AITER, [*AITER]),
    ("elementwise", {"elementwise": {"backend": "triton"}}, [*GPUS]),
    ("gemm", SKINNY, [*GPUS]),
    ("attention", DENOISE, [*GPUS]),
    ("attention", {"attention": {"prefill": "aiter"}}, [*AITER]),
    *(
        ("attention", {"attention": {"prefill": name}}, [m for on in found for m in VENDORS[on]])
        for name, found in SDPA_DEVICES.items()
    ),
    ("precision", TF32, ["CPU", "A100", "H100", "gfx942", "gfx950", "gfx942 without aiter"]),
    ("graph", MANUAL, [*GPUS]),
    ("compile", compiled("reduce_overhead"), [*GPUS]),
    ("compile", compiled("max_autotune"), [*GPUS]),
    ("fusion", {"fusion": {"qkv": True}}, [*ALL]),
    ("fusion", EXPERT, [*GPUS]),
    ("environment", variables(HIP_FORCE_DEV_KERNARG=1), VENDORS["rocm"]),
    ("environment", variables(CUDA_MODULE_LOADING="EAGER"), VENDORS["cuda"]),
    ("environment", variables(DISABLE_ADDMM_CUDA_LT=1), [*GPUS]),
    ("environment", variables(OMP_NUM_THREADS=2), [*ALL]),
]  # fmt: skip


@pytest.mark.parametrize(("knob", "raw", "where"), RUNS)
def test_an_option_runs_on_these_machines_and_no_others(knob, raw, where):
    found = {name: BY_NAME[knob].check(config(raw, on), on) for name, on in ALL.items()}
    assert {name for name, refusal in found.items() if refusal is None} == set(where)
    refused = [refusal for refusal in found.values() if refusal is not None]
    assert all(refusal.outcome == "unavailable" and refusal.reason for refusal in refused)


CONTRADICTIONS: list[tuple[str, Raw, Machine, str]] = [
    ("blas", {"blas": {"library": "rocblas"}, **variables(TORCH_BLAS_PREFER_HIPBLASLT=1)}, MI300X,
     "TORCH_BLAS_PREFER_HIPBLASLT"),
    ("blas", {**FP8, **FLOAT32}, H100, "precision=bfloat16"),
    ("blas", {**FP8, **FLOAT32}, T4, "precision=bfloat16"),
    ("blas", {**BLAS_AITER, **FLOAT32}, MI300X, "precision=bfloat16"),
    ("blas", {**FP8, **SKINNY}, H100, "gemm=torch or restrict blas.fp8.stages"),
    ("blas", {**BLAS_AITER, **SKINNY}, MI300X, "gemm=torch or restrict blas.aiter.max_rows"),
    ("blas", {"blas": {"backend": "fp8", "pad_strides": True}}, H100, "pad_strides"),
    ("blas", {**PAD, **SKINNY}, H100, "pad_strides"),
    ("blas", {**PAD, "fusion": FUSED}, H100, "pad_strides"),
    ("blas", {**SEARCHED, **FLOAT32}, H100, "searched"),
    ("blas", {"blas": {"algorithm": "searched", "library": "cublas"}}, H100, "cublas"),
    ("blas", {"blas": {"algorithm": "searched", "backend": "fp8"}, **RESIDUALS}, H100,
     "fusion.residuals"),
    ("fusion", RESIDUALS, H100, "searched"),
    ("elementwise", {**ELEMENTWISE_AITER, **FLOAT32}, MI300X, "precision=bfloat16"),
    ("attention", {"attention": {"prefill": "flash"}, **FLOAT32}, H100, "float32"),
    ("attention", {"attention": {"prefill": "cudnn"}, **FLOAT32}, H100, "float32"),
    *(
        ("attention", {"attention": {stage: backend}, **FLEXIBLE}, CPU,
         f"attention.{stage}={backend}.*workload.layout=exact")
        for stage in ("prefill", "denoise")
        for backend in ("flash", "aiter")
    ),
    ("compile", {**compiled("reduce_overhead"), **MANUAL}, H100, "graph"),
    ("compile", {**compiled("max_autotune"), **MANUAL}, H100, "graph"),
    ("fusion", {"fusion": {"vision_mlp": True}, **BLAS_AITER}, CPU, "vision_mlp"),
    ("fusion", {"fusion": {"vision_mlp": True}, "blas": {**FP8["blas"], "fp8": {"stages": [
        "vision"]}}}, CPU, "vision_mlp"),
    ("fusion", {**EXPERT, "fusion": {**FUSED, "qkv": False}}, H100, "needs fusion.qkv"),
    ("fusion", {**EXPERT, "fusion": {**FUSED, "gate_up": False}}, H100, "fusion.gate_up"),
    ("fusion", {**EXPERT, **FLOAT32}, H100, "16-bit"),
    ("fusion", {**EXPERT, "attention": {**TRITON, "denoise": "sdpa"}}, H100,
     "attention.denoise=triton"),
    ("fusion", {**EXPERT, "gemm": {}}, H100, "gemm=triton_skinny"),
    ("fusion", {**EXPERT, "blas": {"backend": "fp8", "fp8": {"stages": ["vision", "denoise"]}}},
     H100, "blas.fp8.stages"),
    ("fusion", {**EXPERT, "blas": {"backend": "aiter", "aiter": {"max_rows": 8}}}, MI300X, "aiter"),
    ("fusion", {**EXPERT, "model": {"name": "pi05_mini"}}, H100, "simplify.time_mlp"),
    *(
        ("environment", variables(**dict.fromkeys(names, value)), MI300X, ".*".join(names))
        for names, value in (
            (("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True"),
            (("DISABLE_ADDMM_CUDA_LT", "DISABLE_ADDMM_HIP_LT"), "1"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("knob", "raw", "on", "words"), CONTRADICTIONS)
def test_options_that_contradict_are_invalid_and_named(knob, raw, on, words):
    refusal = BY_NAME[knob].check(config(raw, on), on)
    assert refusal is not None
    assert refusal.outcome == "invalid"
    assert re.search(words, refusal.reason), refusal.reason


COMPATIBLE: list[tuple[str, Raw, Machine]] = [
    ("blas", variables(TORCH_BLAS_PREFER_HIPBLASLT=1), MI300X),
    ("blas", {**FP8_PREFIX, **SKINNY}, H100),
    ("blas", {"blas": {"backend": "aiter", "aiter": {"max_rows": 11}}, **SKINNY}, MI300X),
    ("attention", {"attention": {"prefill": "efficient"}, **FLOAT32}, H100),
    ("attention", {"attention": {"prefill": "math"}, **FLOAT32}, H100),
    ("attention", {"attention": {"vision": "flash"}, **FLEXIBLE}, CPU),
    ("compile", {**compiled(), **MANUAL}, H100),
    ("fusion", {**RESIDUALS, **SEARCHED}, H100),
    ("fusion", {**EXPERT, "workload": {"horizon": 31, "batch_size": 3}}, H100),
    ("fusion", {**EXPERT, **FP8_PREFIX}, H100),
    ("fusion", {**EXPERT, "model": {"name": "pi05_mini"}, "simplify": {"time_mlp": True}}, H100),
    ("fusion", {**EXPERT, "precision": {"dtype": "float16"}}, H100),
    ("fusion", {**EXPERT, "elementwise": {"backend": "triton"}}, MI300X),
]  # fmt: skip


@pytest.mark.parametrize(("knob", "raw", "on"), COMPATIBLE)
def test_options_that_go_together(knob, raw, on):
    assert BY_NAME[knob].check(config(raw, on), on) is None


def test_a_buffer_means_nothing_to_the_expert_layer():
    buffer: Raw = {"simplify": {"kv_buffer": True}}
    notes = BY_NAME["simplify"].notes
    assert "kv_buffer" in notes(config({**EXPERT, **buffer}, H100))[0]
    assert notes(config(buffer, H100)) == []


@pytest.mark.parametrize(
    ("knob", "raw"),
    [("blas", BLAS_AITER), ("blas", FP8_AITER), ("elementwise", ELEMENTWISE_AITER)],
)
def test_an_aiter_that_cannot_be_imported_is_unavailable(knob, raw):
    small: Raw = {"workload": {"steps": 1, "active_cameras": [True]}}
    policy = runtime.build_policy(config(small), torch.device("cpu"))
    with pytest.raises(RefusedError, match=f"{knob}.*importing AMD's aiter failed") as error:
        BY_NAME[knob].transform(policy, config({**small, **raw}, MI300X))
    assert error.value.outcome == "unavailable"


def blas(**given: object) -> Raw:
    return {"blas": given}


def attention(**given: object) -> Raw:
    return {"attention": given}


PI05: Raw = {"model": {"name": "pi05_mini"}}
SAME: list[tuple[Raw, Raw, Machine]] = [
    # What is not chosen is not read.
    (blas(aiter={"max_rows": 64, "preshuffle": True}, fp8={"stages": ["vision"]}), {}, MI300X),
    (blas(fp8={"gemm": "aiter"}), {}, MI300X),
    (tunable(file="x.csv", rotating_mib=9), {}, MI300X),
    (blas(backend="aiter", aiter={"preshuffle_min_rows": 1}), BLAS_AITER, MI300X),
    (blas(backend="fp8", fp8={"stages": ["denoise", "vision", "prefill"]}), FP8, MI300X),
    (blas(backend="fp8", fp8={"fast_accum": False}), FP8, MI300X),
    (compiled("off", "call", freezing=True), {}, H100),
    ({"gemm": {"max_rows": 8}}, {}, H100),
    (attention(launch_denoise={"block_n": 32}), {}, H100),
    (attention(**TRITON, launch_vision={"fused": 1, "blocks": 2}), attention(**TRITON), H100),
    (attention(**TRITON, launch_denoise={"waves_per_eu": 2}), attention(**TRITON), H100),
    ({**EXPERT, "simplify": {"kv_buffer": True}}, EXPERT, H100),
    ({**PI05, "simplify": {"state_once": True}}, PI05, CPU),
    (TF32, FLOAT32, CPU),
    (variables(HIP_CACHE_ENABLED=1, TORCH_ROCM_USE_HIPBLASLT=0), {}, MI300X),
    # Inductor has no reader for it, or reads the value that it has anyway.
    (compiled(group_fusion=True, benchmark_kernel=True), compiled(), H100),
    (compiled(max_fusion_size=64, shape_padding=True, freezing=False), compiled(), H100),
    (compiled(max_autotune_gemm_backends="ATEN"), compiled(), H100),
    (compiled(max_autotune_gemm=False), compiled(), H100),
    (compiled("max_autotune", max_autotune_pointwise=True), compiled("max_autotune"), H100),
    (compiled("max_autotune", coordinate_descent_tuning=True), compiled("max_autotune"), H100),
    # The order in which variables are given does not matter.
    (variables(GPU_MAX_HW_QUEUES=2, HIP_FORCE_DEV_KERNARG=1),
     variables(HIP_FORCE_DEV_KERNARG=1, GPU_MAX_HW_QUEUES=2), MI300X),
]  # fmt: skip
OTHER: list[tuple[Raw, Raw, Machine]] = [
    (blas(backend="fp8", fp8={"stages": ["vision"]}), FP8, H100),
    (blas(backend="fp8", fp8={"fast_accum": False}), FP8, H100),
    (blas(library="cublaslt"), {}, H100),
    (FP8_AITER, FP8, MI300X),
    (compiled(freezing=True), compiled(), H100),
    (compiled(max_fusion_size=128), compiled(), H100),
    (compiled("max_autotune", max_autotune_gemm_backends="ATEN"), compiled("max_autotune"), H100),
    (compiled(max_autotune_gemm=True, max_autotune_gemm_backends="ATEN"),
     compiled(max_autotune_gemm=True), H100),
    (compiled("max_autotune", coordinate_descent_tuning=False), compiled("max_autotune"), H100),
    (compiled(coordinate_descent_tuning=True), compiled(), H100),
    (compiled(triton={"multi_kernel": 1}), compiled(), H100),
    (compiled(scope="call"), compiled(), H100),
    (attention(**TRITON, launch_denoise={"block_n": 32}), attention(**TRITON), H100),
    *((attention(prefill=name), attention(prefill="sdpa"), H100) for name in SDPA_DEVICES),
    ({"simplify": {"kv_buffer": True}}, {}, H100),
    (TF32, FLOAT32, H100),
    (variables(HIP_FORCE_DEV_KERNARG=1), {}, MI300X),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "same_as", "on"), SAME)
def test_what_has_no_effect_does_not_count(raw, same_as, on):
    assert config(raw, on).hash() == config(same_as, on).hash()


@pytest.mark.parametrize(("raw", "other", "on"), OTHER)
def test_what_has_an_effect_counts(raw, other, on):
    assert config(raw, on).hash() != config(other, on).hash()
