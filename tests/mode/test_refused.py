"""What has no order here is refused in a strict mode and warned of in the other, by name; what moves nothing is not."""
from __future__ import annotations

import re
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
import torch.nn.functional as F
from models import batch, model, prompts
from torch import nn
from torch._dynamo.testing import rand_strided
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import ViTConfig, ViTForImageClassification

from kernels import runtime
from kernels.bits import portable
from kernels.mode import MovesBits, Refused, active, batch_invariant, refused_draws, refused_libraries
from kernels.mode.names import full_name, op_of
from kernels.mode.switch import KEYS, RULES

DEVICE = runtime.device()
ON_A_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU's libraries")


def made(*sizes, seed=0):
    rows = sizes[0] if len(sizes) > 1 else 1
    return portable(rows, torch.Size(sizes).numel() // rows, torch.float32, DEVICE, seed).view(sizes)


X, W = made(6, 40), made(24, 40, seed=1)
Q = made(2, 4, 5, 8, seed=3)


def attention(*, dtype=torch.float32, **named):
    return lambda: F.scaled_dot_product_attention(*[Q.to(dtype)] * 3, **named)


REFUSED = {
    "a dense mask": (attention(attn_mask=made(5, 5)), "scaled_dot_product_attention.*attn_mask is dense"),
    "a mask with holes": (attention(attn_mask=torch.arange(5, device=DEVICE) % 2 == torch.zeros(5, 1, device=DEVICE)),
                          "scaled_dot_product_attention.*attn_mask is dense in another way"),
    "a mask for each head": (attention(attn_mask=torch.arange(100, device=DEVICE).view(1, 4, 5, 5) % 3 > 0),
                             "attn_mask is not"),
    "dropout in training": (lambda: F.dropout(X, 0.5, training=True), "as dropout does|dropout moves"),
    "dropout in attention": (attention(dropout_p=0.5), "as dropout does|dropout_p is 0.5"),
    "float64": (lambda: X.double() @ W.t().double(), "mm has an order for .*self is torch.float64"),
    # where PyTorch has no kernel it multiplies itself
    "float64 attention": (attention(dtype=torch.float64), "(scaled_dot_product_attention|bmm).* is torch.float64"),
    "float64 sum": (lambda: X.sum(dtype=torch.float64), "sum has an order for .*torch.float64"),
    "sparse": (lambda: torch.mm(X.to_sparse(), W.t()), "mm has no order for sparse tensors, and self"),
    "complex": (lambda: torch.mm(X.cfloat(), W.t().cfloat()), "mm has an order for .*self is torch.complex64"),
    "batches": (lambda: torch.addbmm(Q[0, 0, :, :5], Q[0], Q[0].mT),
                "addbmm adds over its matrices"),
    "conv1d": (lambda: F.conv1d(Q[0], made(3, 5, 3)), "convolution moves its bits"),
    "var": (lambda: X.var(-1), "var.correction moves its bits"),
    "norm": (lambda: torch.linalg.norm(X), "linalg_vector_norm moves its bits"),
    "prod": (lambda: X.prod(-1), "prod.dim_int moves its bits"),
    "index_add": (lambda: X.clone().index_add_(0, torch.zeros(2, dtype=torch.int64, device=DEVICE), X[:2]),
                  "index_add_ moves its bits"),
    "scatter_add": (lambda: X.scatter_add(0, torch.zeros(2, 40, dtype=torch.int64, device=DEVICE), X[:2]),
                    "scatter_add moves its bits"),
    "index_put": (lambda: X.clone().index_put_((torch.zeros(2, dtype=torch.int64, device=DEVICE),), X[:2],
                                               accumulate=True), "index_put_ moves its bits"),
    "multinomial": (lambda: X.abs().multinomial(1), "multinomial moves its bits"),
    "batch_norm": (lambda: F.batch_norm(X, None, None, training=True), "batch_norm moves its bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name):
    call, says = REFUSED[name]
    with batch_invariant(strict=True), pytest.raises(Refused, match=says):
        call()
    assert not active()


@pytest.mark.parametrize("name", REFUSED)
def test_or_passed_through_with_a_warning(name):
    call, says = REFUSED[name]
    torch.manual_seed(0)
    with batch_invariant(), pytest.warns(MovesBits, match=says):
        result = call()
    torch.manual_seed(0)
    torch.testing.assert_close(result, call())


def test_it_is_warned_of_once_a_block():
    with warnings.catch_warnings(record=True) as seen, batch_invariant():
        warnings.simplefilter("always")
        for _ in range(3):
            X.var()
    assert len([w for w in seen if w.category is MovesBits]) == 1


@pytest.mark.parametrize("call", [lambda: F.dropout(X, 0.5, training=False), lambda: X.cumsum(0) if X.is_cpu else X,
                                  lambda: F.batch_norm(X, X[0], X[0].abs(), training=False),
                                  lambda: X.clone().index_put_((torch.tensor([1, 0], device=DEVICE),), X[:2])])
def test_what_does_not_move_passes_in_silence(call):
    with warnings.catch_warnings(), batch_invariant(strict=True):
        warnings.simplefilter("error")
        call()


# Libraries, and kernels whose steps follow the batch.

ROWS = made(30, 6)
SQUARE = ROWS[:6] @ ROWS[:6].t() + 6 * torch.eye(6, device=DEVICE)
COMPLEX = torch.complex(ROWS, ROWS + 1)
SPARSE, COMPRESSED = ROWS[:6].relu().to_sparse(), ROWS[:6].relu().to_sparse_csr()
FACTORS, LDL = ([t.to(DEVICE) for t in factor(SQUARE.cpu())] for factor in
                (torch.linalg.lu_factor, torch.linalg.ldl_factor))


def backward_alone(function, x):
    """The gradient inside of the mode, of a forward that was outside."""
    x = x.detach().clone().requires_grad_()
    with torch._C._ExcludeDispatchKeyGuard(KEYS):
        y = function(x)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def of_linear_algebra(name, reached=None):
    return lambda: getattr(torch.linalg, name)(SQUARE), f"linalg_{reached or name} runs in a library of linear algebra"


LIBRARIES = {
    "cdist": (lambda: torch.cdist(ROWS, ROWS), "cdist adds in an order that follows the number of rows"),
    "cdist of few rows": (lambda: torch.cdist(ROWS[:3], ROWS[:3], p=1.0), "cdist adds"),
    "cdist's gradient": (lambda: backward_alone(lambda x: torch.cdist(x, ROWS[:5], p=1.0), ROWS), "cdist adds"),
    **{name: of_linear_algebra(name) for name in (
        "det", "slogdet", "inv_ex", "cholesky_ex", "qr", "svd", "eig", "eigvals", "eigh", "lu", "lu_factor_ex",
        "ldl_factor_ex")},
    **{name: of_linear_algebra(name, reached) for name, reached in {
        "inv": "inv_ex", "cholesky": "cholesky_ex", "svdvals": "svd", "pinv": "svd", "cond": "svd",
        "matrix_rank": "svd", "eigvalsh": "eigh", "lu_factor": "lu_factor_ex", "ldl_factor": "ldl_factor_ex"}.items()},
    "solve": (lambda: torch.linalg.solve(SQUARE, SQUARE), "linalg_solve_ex runs"),
    "lstsq": (lambda: torch.linalg.lstsq(SQUARE, SQUARE), "linalg_lstsq runs"),
    "solve_triangular": (lambda: torch.linalg.solve_triangular(SQUARE.triu(), SQUARE, upper=True),
                         "linalg_solve_triangular runs"),
    "lu_solve": (lambda: torch.linalg.lu_solve(*FACTORS, SQUARE), "linalg_lu_solve runs"),
    "ldl_solve": (lambda: torch.linalg.ldl_solve(*LDL, SQUARE), "linalg_ldl_solve runs"),
    "householder_product": (lambda: torch.linalg.householder_product(SQUARE, SQUARE[0]),
                            "linalg_householder_product runs"),
    "torch.cholesky": (lambda: torch.cholesky(SQUARE), "cholesky runs"),
    "cholesky_inverse": (lambda: torch.cholesky_inverse(SQUARE), "cholesky_inverse runs"),
    "cholesky_solve": (lambda: torch.cholesky_solve(SQUARE, SQUARE), "cholesky_solve runs"),
    "geqrf": (lambda: torch.geqrf(SQUARE), "geqrf runs"),
    "ormqr": (lambda: torch.ormqr(SQUARE, SQUARE[0], SQUARE), "ormqr runs"),
    "triangular_solve": (lambda: torch.triangular_solve(SQUARE, SQUARE), "triangular_solve runs"),
    "inv into a tensor": (lambda: torch.linalg.inv(SQUARE, out=torch.zeros_like(SQUARE)), "linalg_inv_ex.inverse runs"),
    "rfft": (lambda: torch.fft.rfft(ROWS), "fft runs in a library's transform"),
    "irfft": (lambda: torch.fft.irfft(COMPLEX), "fft runs"),
    "fft2": (lambda: torch.fft.fft2(COMPLEX), "fft runs"),
    "stft": (lambda: torch.stft(ROWS.flatten(), 20, window=torch.ones(20, device=DEVICE), return_complex=True),
             "fft runs"),
    "powers": (lambda: torch.ops.aten.linalg__powsum(ROWS), "linalg__powsum adds"),
    "sparse.sum": (lambda: torch.sparse.sum(SPARSE, 0), "sparse.sum.dim adds floats of sparse tensors"),
    "sparse.softmax": (lambda: torch.sparse.softmax(SPARSE, 1), "sparse.softmax adds"),
    "sparse.log_softmax": (lambda: torch.sparse.log_softmax(SPARSE, 1), "sparse.log_softmax adds"),
    "sparse.mm": (lambda: torch.sparse.mm(SPARSE, SPARSE), "sparse.mm adds"),
    "sparse.addmm": (lambda: torch.sparse.addmm(SQUARE, SPARSE, SQUARE), "sparse.addmm adds"),
    "sampled_addmm": (lambda: torch.sparse.sampled_addmm(COMPRESSED, SQUARE, SQUARE), "sparse_sampled_addmm adds"),
    "hspmm": (lambda: torch.hspmm(SPARSE, SQUARE), "hspmm adds"),
    "conv_tbc": (lambda: torch.conv_tbc(ROWS.view(5, 6, 6), made(3, 6, 6), SQUARE[0]), "conv_tbc is a convolution"),
}
ON_CPUS_ALONE = {
    "mkldnn_linear": (lambda: torch._C._nn.mkldnn_linear(ROWS.to_mkldnn(), SQUARE.to_mkldnn()).to_dense(),
                      "mkldnn_linear runs in a library of Intel's"),
    "mkldnn pooling": (lambda: F.adaptive_avg_pool2d(Q[:, :, :4].to_mkldnn(), 2).to_dense(),
                       "mkldnn_adaptive_avg_pool2d runs"),
    "mkldnn gelu": (lambda: F.gelu(ROWS.to_mkldnn()).to_dense(), "gelu has no fixed place .* for torch._mkldnn"),
    "sparse tanh": (lambda: SPARSE.tanh(), "tanh has no fixed place in a CPU's loops for torch.sparse_coo"),
    "sparse.mm with a reduction": (lambda: torch.sparse.mm(COMPRESSED, SQUARE, "sum"), "sparse.mm adds"),
    "sgn": (lambda: COMPLEX.sgn(), "sgn has no fixed place in a CPU's loops for torch.complex64"),
    "angle": (lambda: COMPLEX.angle(), "angle has no fixed place"),
    "addcmul": (lambda: torch.addcmul(COMPLEX, COMPLEX, COMPLEX), "addcmul has no fixed place"),
    "addcmul_": (lambda: COMPLEX.clone().addcmul_(COMPLEX, COMPLEX), "addcmul_ has no fixed place"),
    "lerp": (lambda: torch.lerp(COMPLEX, COMPLEX + 1, 0.3), "lerp.Scalar has no fixed place"),
    "abs's gradient": (lambda: backward_alone(torch.abs, COMPLEX), "sgn has no fixed place"),
}
DRAWS = {
    "randn": lambda: torch.randn(3), "rand": lambda: torch.rand(3), "randperm": lambda: torch.randperm(3),
    "randint": lambda: torch.randint(9, (3,)), "randn.generator": lambda: torch.randn(3, generator=torch.Generator()),
    "normal.float_float": lambda: torch.normal(0.0, 1.0, (3,)), "normal.Tensor_float": lambda: torch.normal(X, 1.0),
    "normal.float_Tensor": lambda: torch.normal(0.0, X.abs()), "normal.Tensor_Tensor": lambda: torch.normal(X, X.abs()),
    "randn_like": lambda: torch.randn_like(X), "rand_like": lambda: torch.rand_like(X),
    "randint_like": lambda: torch.randint_like(X, 9), "rrelu": lambda: F.rrelu(X, training=True),
    "multinomial.out": lambda: torch.multinomial(X.abs(), 1, out=torch.zeros(6, 1, dtype=torch.int64, device=DEVICE)),
    "bernoulli.out": lambda: torch.bernoulli(X.abs().clamp(max=1), out=torch.zeros_like(X)),
    "random_.to": lambda: X.clone().random_(9), "random_.from": lambda: X.clone().random_(1, 9),
    "geometric_": lambda: X.clone().geometric_(0.5),
    **{name: lambda name=name: getattr(X.clone(), name)() for name in (
        "uniform_", "normal_", "random_", "cauchy_", "log_normal_", "exponential_")},
}


def dynamic(layer, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)}, dtype)


def names_it(call, says):
    """Refused in a strict mode, warned of in the other, with the words."""
    with batch_invariant(strict=True), pytest.raises(Refused, match=f"batch_invariant: {says}"):
        call()
    a_build_may_lack_it = nullcontext() if DEVICE.type == "cpu" else suppress(RuntimeError)
    with batch_invariant(), pytest.warns(MovesBits, match=f"batch_invariant: {says}"), a_build_may_lack_it:
        call()


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.filterwarnings("ignore:torch")  # some are deprecated
def test_what_runs_in_a_library_is_named(name):
    names_it(*LIBRARIES[name])


@ON_A_CPU
@pytest.mark.parametrize("name", ON_CPUS_ALONE)
def test_what_a_cpu_moves_is_named(name):
    names_it(*ON_CPUS_ALONE[name])


@pytest.mark.parametrize("name", DRAWS)
def test_a_random_draw_is_named(name):
    names_it(DRAWS[name], rf"{re.escape(name)} draws from one stream")


@ON_A_CPU
@pytest.mark.skipif(not torch.backends.quantized.supported_engines or "fbgemm" not in
                    torch.backends.quantized.supported_engines, reason="this CPU has no quantized layers")
def test_a_layer_that_is_quantized_as_it_runs_is_named():
    linear = nn.Linear(6, 6)
    names_it(lambda: dynamic(linear, torch.qint8)(ROWS), "quantized::linear_dynamic takes the scale .* from the whole")
    names_it(lambda: dynamic(linear, torch.float16)(ROWS), "quantized::linear_dynamic_fp16 runs in a library's product")
    names_it(lambda: dynamic(nn.LSTM(6, 6), torch.qint8)(ROWS[None]), "quantized_lstm.input takes the scale")


# What passes in silence.

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.randn(4) + torch.rand(4))
        self.register_buffer("noise", torch.empty(3).normal_())
        nn.init.orthogonal_(self.own.data.view(2, 2))

    def forward(self, x):
        return x + torch.randn(len(x), 1, device=x.device)


def faked():
    with FakeTensorMode():
        return torch.randn(3)


def vit():
    return ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                               intermediate_size=48, image_size=16, patch_size=8))


BUILDS = {
    "linear": lambda: nn.Linear(3, 4), "embedding": lambda: nn.Embedding(3, 4), "lstm": lambda: nn.LSTM(3, 4),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2), "a module that draws for itself": Noisy, "vit": vit,
    "llama": lambda: model.__wrapped__("llama"), "gpt2": lambda: model.__wrapped__("gpt2"),
    "an init of a tensor": lambda: nn.init.trunc_normal_(torch.zeros(4)),
    "a sparse init": lambda: nn.init.sparse_(torch.zeros(4, 4), 0.5),
    "a parameter anew": lambda: nn.Parameter(X.clone()).requires_grad_(False).uniform_(),
    "on meta": lambda: torch.randn(3, device="meta"),
    "on fake tensors": faked,
    "what PyTorch draws for itself": lambda: exec(compile("torch.randn(3)", torch.__file__, "exec")),  # noqa: S102
    "a loader": lambda: list(torch.utils.data.DataLoader(range(9), 2, shuffle=True)),
    "a split": lambda: torch.utils.data.random_split(range(9), [4, 5]),
    "numbers to time kernels with": lambda: rand_strided((3,), (1,), device=DEVICE),
    "such numbers like others": lambda: exec(compile("torch.rand_like(X)", torch._inductor.__file__, "exec"), {  # noqa: S102
        "torch": torch, "X": X}),
    "rrelu in evaluation": lambda: F.rrelu(X),
    "data movement": lambda: (torch.lu_unpack(*FACTORS), torch.linalg.diagonal(X), X.tril(), SPARSE.to_dense()),
    "products": lambda: (torch.linalg.multi_dot([SQUARE, SQUARE, SQUARE]), torch.linalg.matrix_power(SQUARE, 3),
                         torch.linalg.vander(X[0]), torch.linalg.cross(X[:, :3], X[:, 3:6])),
    "real numbers": lambda: (X.sgn(), X.angle(), torch.addcmul(X, X, X), X.lerp(X, 0.5), X.clone().lerp_(X, 0.5)),
}


@pytest.mark.parametrize("name", BUILDS)
def test_what_is_no_row_of_a_batch_passes_in_silence(name):
    with warnings.catch_warnings(), batch_invariant(strict=True):
        warnings.simplefilter("error", MovesBits)
        BUILDS[name]()


def test_a_module_that_draws_when_it_is_called_is_named():
    with batch_invariant(strict=True):
        noisy = Noisy().to(DEVICE)
        with pytest.raises(Refused, match="randn draws from one stream"):
            noisy(X)


@pytest.mark.parametrize("name, allowed", [("llama", ()), ("gpt2", ()), ("vit", ("convolution",
                                                                                 "convolution_backward"))])
def test_of_an_ordinary_model_nothing_else_is_warned_of(name, allowed):
    network = vit().to(DEVICE).eval() if name == "vit" else model(name)
    given = {"pixel_values": made(2, 3, 16, 16)} if name == "vit" else batch(prompts((5, 3)), left=True)
    with warnings.catch_warnings(record=True) as seen, batch_invariant():
        warnings.simplefilter("always", MovesBits)
        network(**given).logits.square().mean().backward()
    network.zero_grad()
    assert {str(w.message).split()[1] for w in seen if w.category is MovesBits} == set(allowed)


# Every op that PyTorch registers.

def registered():
    """ATen's ops that are no composites of others, which are reached in their parts: name, op."""
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        name = full.removeprefix("aten::")
        if full != name and (op := op_of(name)) is not None and \
                not torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd"):
            yield name, op


def has_a_rule(name) -> bool:
    """Its own, or that of the op that this overload, which PyTorch generated, calls and copies from."""
    packet, _, overload = name.partition(".")
    generated = "out" in overload and not torch._C._dispatch_has_kernel_for_dispatch_key(full_name(name), "CPU")
    return name in RULES or generated and any(rule.partition(".")[0] == packet for rule in RULES)


NO_STEPS = {"lu_unpack", "linalg_cross", "_linalg_check_errors", "slice_inverse", "_sparse_sum_backward"}
REACH_OTHERS = {"linalg_pinv", "cholesky_solve"}
ALGEBRA = re.compile(r"_?linalg_|_?cholesky|qr$|geqrf|orm?g?qr|lu_|_lu_|ldl|lstsq|_?eig|svd|_?triangular_solve|solve$|"
                     r"_?spsolve|inverse$|det$|slogdet|logdet|householder|_fft_|_?cdist|_euclidean_dist|matrix_exp|"
                     r"_sparse_(sum|softmax|log_softmax|mm|addmm|sparse)|mkldnn_linear|lobpcg")


def test_no_op_of_linear_algebra_is_forgotten():
    found = [name for name, _ in registered() if ALGEBRA.match(name.partition(".")[0])
             and name.partition(".")[0] not in NO_STEPS | REACH_OTHERS]
    assert len(found) > 60 and [name for name in found if not has_a_rule(name)] == []


ATTENTION = re.compile(r".*(attention|_sdp_|mem_eff_dropout|_softmax_with_shape)")  # refused for dropout, or reached
LAYERS = {"_cudnn_init_dropout_state", "miopen_rnn", "_lstm_mps"}  # no draws, and devices that have no rules


def test_no_op_that_draws_is_forgotten():
    found = [name for name, op in registered() if torch.Tag.nondeterministic_seeded in op.tags
             and not ATTENTION.match(name) and name.partition(".")[0] not in LAYERS]
    assert len(found) > 70 and [name for name in found if not has_a_rule(name)] == []


def test_every_name_that_is_listed_exists_somewhere():
    lists = (*refused_libraries.WHY, refused_draws.OF_A_TENSOR, refused_draws.IN_PLACE, refused_draws.FUNCTIONAL,
             refused_draws.FROM_A_SHAPE, refused_draws.WITH_NOISE)
    ruled = {name.partition(".")[0] for name in RULES}
    lacking = {name for names in lists for name in names} - ruled
    assert all(name.startswith(("mkl::", "mkldnn::", "onednn::", "quantized::")) for name in lacking)
