"""Ops that run in a library or a kernel whose steps follow the batch: refused, or warned of, by name.

No row of the atlas ran them. A library may take one matrix in other steps than several on one device and not on
another, so these ops have a rule on all. What a module computes while it is built (torch.nn.init.orthogonal_) passes.
"""
from __future__ import annotations

from collections.abc import Callable

from .callers import makes_weights
from .names import overloads_of
from .switch import Unsupported, rule

LINEAR_ALGEBRA = (
    "_cholesky_solve_helper", "_linalg_det", "_linalg_eigh", "_linalg_eigvals", "_linalg_slogdet", "_linalg_solve_ex",
    "_linalg_svd", "_spsolve", "cholesky", "cholesky_inverse", "geqrf", "linalg_cholesky_ex", "linalg_eig",
    "linalg_eigvals", "linalg_householder_product", "linalg_inv_ex", "linalg_ldl_factor_ex", "linalg_ldl_solve",
    "linalg_lstsq", "linalg_lu", "linalg_lu_factor_ex", "linalg_lu_solve", "linalg_qr", "linalg_solve_triangular",
    "ormqr", "triangular_solve")
TRANSFORMS = ("_fft_r2c", "_fft_c2r", "_fft_c2c")
DISTANCES = ("_cdist_forward", "_cdist_backward", "_euclidean_dist")
POWERS = ("linalg__powsum",)
SPARSE = ("_sparse_sum", "_sparse_csr_sum", "_sparse_csr_prod", "_sparse_softmax", "_sparse_softmax_backward_data",
          "_sparse_log_softmax", "_sparse_log_softmax_backward_data", "_sparse_addmm", "_sparse_sparse_matmul",
          "_sparse_mm_reduce_impl", "_sparse_mm_reduce_impl_backward", "sparse_sampled_addmm", "hspmm", "sspaddmm",
          "_cslt_sparse_mm", "_sparse_semi_structured_linear", "_sparse_semi_structured_mm",
          "_sparse_semi_structured_addmm")
MKLDNN = ("mkldnn_linear", "mkldnn_linear_backward", "mkldnn_linear_backward_input", "mkldnn_linear_backward_weights",
          "mkldnn_adaptive_avg_pool2d", "mkldnn_adaptive_avg_pool2d_backward", "mkldnn::_linear_pointwise",
          "mkl::_mkl_linear")
CONVOLUTIONS = (
    "_convolution", "mkldnn_convolution", "cudnn_convolution", "cudnn_convolution_transpose", "cudnn_convolution_relu",
    "cudnn_convolution_add_relu", "convolution_backward_overrideable", "conv_tbc", "conv_depthwise3d",
    "_conv_depthwise2d", "_slow_conv2d_forward", "_slow_conv2d_backward", "slow_conv3d_forward", "slow_conv_dilated2d",
    "slow_conv_dilated3d", "slow_conv_transpose2d", "slow_conv_transpose3d", "_nnpack_spatial_convolution",
    "mkldnn::_convolution_pointwise", "mkldnn::_convolution_pointwise_", "mkldnn::_convolution_transpose_pointwise")
QUANTIZED = tuple(f"quantized::{name}" for name in (
    "linear_dynamic", "linear_relu_dynamic", "conv1d_dynamic", "conv2d_dynamic", "conv3d_dynamic",
    "conv_transpose1d_dynamic", "conv_transpose2d_dynamic", "conv_transpose3d_dynamic", "quantized_lstm_cell_dynamic",
    "quantized_gru_cell_dynamic", "quantized_rnn_relu_cell_dynamic", "quantized_rnn_tanh_cell_dynamic")) + (
    "quantized_lstm", "quantized_gru")
HALF = ("quantized::linear_dynamic_fp16", "quantized::linear_relu_dynamic_fp16",
        "quantized::linear_dynamic_fp16_unpacked_weight", "onednn::linear_dynamic_fp16",
        "onednn::linear_relu_dynamic_fp16")

WHY = {
    LINEAR_ALGEBRA: "runs in a library of linear algebra, which takes other steps for one matrix than for several",
    TRANSFORMS: "runs in a library's transform, whose steps follow the batch and the threads",
    DISTANCES: "adds in an order that follows the number of rows",
    POWERS: "adds in an order that follows the shape, as linalg_vector_norm does",
    SPARSE: "adds floats of sparse tensors, and has no order here",
    MKLDNN: "runs in a library of Intel's, whose steps follow the batch and the threads",
    CONVOLUTIONS: "is a convolution in a library or a kernel whose steps follow the batch",
    QUANTIZED: "takes the scale of a row's numbers from the whole batch",
    HALF: "runs in a library's product of float16 weights, and has no order here",
}


def _refusal(why: str) -> Callable:
    def refuse(*arguments, **named):
        if makes_weights():
            return NotImplemented
        raise Unsupported(why)
    return refuse


for _packets, _why in WHY.items():
    for _packet in _packets:
        rule(*overloads_of(_packet))(_refusal(_why))
