"""Category of a kernel or operator by its name.

Names are all that a profiler keeps, so this is a reading of names: it says what a kernel is called
after, and a fused kernel has one category only. The rules are tried in order, the first that
matches decides; the order is part of each rule. A name that no rule knows is `other`.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

Category = Literal[
    "gemm",
    "attention",
    "norm",
    "rope",
    "activation",
    "elementwise",
    "memory",
    "conv",
    "other",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)

# Inductor's generated kernels: pointwise, reductions (persistent, looped, split scan), foreach.
# Their names list the operators that were fused, so "scaled_dot_product" or "addmm" in one means
# that it prepares or finishes such an operator, never that it is one.
_FUSED = r"^triton_(?:poi|per|red|spl|for|unk)_fused_"

_ORDERED: tuple[tuple[Category, str], ...] = (
    # --- operators of a CPU profile -------------------------------------------------------------
    # aten::linear, aten::addmm, mkldnn::_linear_pointwise
    (
        "gemm",
        r"^aten::_?(?:linear|addmm|addmm_activation|mm|bmm|baddbmm|addbmm|matmul|mv|addmv|dot|"
        r"einsum|int_mm|scaled_mm|grouped_mm)$",
    ),
    ("gemm", r"^(?:mkldnn|mkl|onednn)::\w*linear"),
    # aten::_scaled_dot_product_flash_attention_for_cpu, aten::_flash_attention_forward,
    # aten::_safe_softmax: attention is the only softmax of the policy
    ("attention", r"^aten::(?:_?scaled_dot_product|_flash_attention|_efficient_attention)"),
    ("attention", r"^aten::_?(?:safe_)?(?:log_)?softmax$"),
    # aten::native_layer_norm, aten::_fused_rms_norm
    ("norm", r"^aten::(?:native_|_fused_)?(?:layer|rms|group|batch)_norm$"),
    # aten::gelu, aten::silu_
    ("activation", r"^aten::(?:gelu|silu|relu|glu|mish|leaky_relu)_?$"),
    # aten::conv2d, aten::_convolution, mkldnn::_convolution_pointwise
    ("conv", r"^(?:aten|mkldnn)::\w*conv(?:\d|ol)"),
    # Shapes only, no data moves: aten::view, aten::transpose. Before the copies, so that a view
    # is never counted as one.
    (
        "other",
        r"^aten::(?:view|view_as|_unsafe_view|_reshape_alias|t|transpose|permute|movedim|slice|"
        r"select|narrow|expand|expand_as|unsqueeze|squeeze|as_strided|split|split_with_sizes|"
        r"chunk|unbind|unflatten|detach|alias|lift_fresh|resolve_conj|resolve_neg|item|"
        r"_local_scalar_dense|is_nonzero|empty|empty_like|empty_strided|new_empty|resize_)$",
    ),
    # aten::copy_, aten::to, aten::cat, aten::embedding; aten::reshape copies when it must
    (
        "memory",
        r"^aten::(?:copy_|to|_to_copy|type_as|clone|contiguous|reshape|flatten|cat|_cat|concat|"
        r"stack|repeat|repeat_interleave|roll|flip|pad|constant_pad_nd|gather|embedding|"
        r"(?:_?index|_unsafe_index)(?:_select|_put|_copy|_put_impl)?_?|scatter_?|fill_|zero_|"
        r"zeros|zeros_like|ones|ones_like|full|full_like|new_zeros|new_ones|new_full|"
        r"scalar_tensor)$",
    ),
    # aten::mul, aten::rsqrt, aten::mean, aten::arange: one arithmetic operation, whatever it is a
    # part of
    (
        "elementwise",
        r"^aten::(?:_?(?:add|sub|rsub|mul|div|neg|pow|square|sqrt|rsqrt|reciprocal|exp|log|sin|cos|"
        r"tanh|sigmoid|erf|abs|sign|floor|ceil|round|remainder|clamp|clamp_min|clamp_max|lerp|"
        r"addcmul|addcdiv|where|masked_fill|maximum|minimum|eq|ne|lt|le|gt|ge|isnan|isinf|isneginf|"
        r"bitwise_\w+|logical_\w+|__and__|__or__|sum|mean|amax|amin|max|min|all|any|cumsum|"
        r"linalg_vector_norm|norm|argmax|arange|linspace|tril|triu|normal|randn|rand|uniform)_?)$",
    ),
    # --- Inductor's fused kernels ---------------------------------------------------------------
    # triton_per_fused__softmax__to_copy_add_5: the softmax of attention written out
    ("attention", _FUSED + r".*softmax"),
    # triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0, triton_per_fused_add_native_layer_norm_18
    ("norm", _FUSED + r".*(?:rsqrt|layer_norm|rms_?norm)"),
    # triton_poi_fused__scaled_dot_product_efficient_attention__to_copy_add_cat_cos_expand_mul_neg_
    # sin_..., triton_poi_fused_add_cat_mul_neg_slice_transpose_view_0 (rotate half)
    ("rope", _FUSED + r".*(?:cos.*sin|cat_mul_neg|cat_transpose)"),
    # triton_poi_fused_gelu_mul_16, triton_poi_fused_addmm_silu_view_4
    ("activation", _FUSED + r".*(?:gelu|silu)"),
    # triton_poi_fused_add_addmm_mul_view_33, triton_per_fused_sum_8
    ("elementwise", _FUSED),
    # --- Inductor's templates -------------------------------------------------------------------
    # triton_tem_fused_flex_attention_0
    ("attention", r"^triton_tem_.*(?:flex|attention)"),
    # triton_tem_fused_convolution_1
    ("conv", r"^triton_tem_.*conv"),
    # triton_tem_fused_addmm_gelu_5: a matrix product with the operators fused behind it
    ("gemm", r"^triton_tem_"),
    # --- libraries and hand-written kernels -----------------------------------------------------
    # attn_fwd.kd (AOTriton), _attn_fwd (aiter), ck_tile FmhaFwdKernel,
    # fmha_cutlassF_bf16_aligned_64x64_rf_sm80, pytorch_flash::flash_fwd_kernel<cutlass...>,
    # flash::FlashAttnFwdSm90, cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16.
    # Before gemm and conv: their templates name cutlass and fprop.
    ("attention", r"attn_fwd|fmha|flash_?(?:fwd|fprop|attn)|flash::|sdpa|attention"),
    # softmax_warp_forward, cunn_SoftMaxForward, prepare_softmax
    ("attention", r"soft_?max"),
    # ck kernel_grouped_conv_fwd_..GridwiseGemm.., Im2d2Col_v2, batched_transpose_32x32_dword
    # (MIOpen's layout change), sm90_xmma_fprop_implicit_gemm_..., implicit_convolve_sgemm,
    # cudnn::ops::nchwToNhwcKernel. Before gemm: most are implicit ones.
    (
        "conv",
        r"conv(?!e)|im2d?2?col|batched_transpose_\d|fprop|winograd|miopen|nchw|igemm_fwd|"
        r"patch_embed",
    ),
    # Cijk_Alik_Bljk_... and Custom_Cijk_... (hipBLASLt, also its Cijk_..._PostGSU reductions)
    ("gemm", r"^(?:Custom_)?Cijk_|PostGSU"),
    # nvjet_tst_128x64_..., cublasLt::splitKreduce_kernel, gemv2T_kernel_val, aiter::bf16gemm_...,
    # wvSplitK, cutlass_80_wmma_tensorop_..., ampere_bf16_s16816gemm_..., _gemm_a16w16_kernel
    (
        "gemm",
        r"nvjet|cublas|split_?k_?reduce|wvSplitK|gemm|gemv|cutlass|matmul|"
        r"(?<![a-z])(?:add|b)?mm(?![a-z])|(?<![a-z])linear(?![a-z\d])|dot_kernel|reduce_1Block_kernel",
    ),
    # vectorized_layer_norm_kernel, _rmsnorm_kernel
    ("norm", r"(?:layer|rms|group)_?norm"),
    # _rope_kernel, rotary_embedding
    ("rope", r"(?<![a-z])rope(?![a-z])|rotary"),
    # _gelu_tanh_and_mul_kernel, GeluCUDAKernelImpl, silu_kernel, act_and_mul_kernel, gated_mlp
    ("activation", r"gelu|silu|act_and_mul|(?<![a-z])gated(?![a-z])"),
    # Memcpy DtoD (Device -> Device), Memset (Device), FillFunctor<int> inside an elementwise
    # kernel, direct_copy_kernel_cuda, CatArrayBatchedCopy_contig, vectorized_gather_kernel
    (
        "memory",
        r"memcpy|memset|copy|(?<!masked_)fill|CatArray|gather|scatter|index_?(?:elementwise|select|put)|"
        r"transpose",
    ),
    # vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<...>>, reduce_kernel<512, 1,
    # at::native::ReduceOp<... MeanOps>>, distribution_elementwise_grid_stride_kernel
    ("elementwise", r"elementwise|reduce_kernel|distribution_|tensor_kernel_scan|scan_.*kernel"),
)
RULES: tuple[tuple[Category, re.Pattern[str]], ...] = tuple(
    (category, re.compile(pattern, re.IGNORECASE)) for category, pattern in _ORDERED
)


def categorise(kernel_name: str) -> Category:
    """The category of a device kernel, a device copy or fill, or an operator call by its name."""
    for category, rule in RULES:
        if rule.search(kernel_name):
            return category
    return "other"
