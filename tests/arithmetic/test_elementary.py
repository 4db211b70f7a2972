"""Exponential, logarithm and fused multiply-add of arithmetic/elementary.py: exact, accurate, monotone, portable."""
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kernels import runtime
from kernels.arithmetic import elementary
from kernels.arithmetic.elementary import exp, fma, log, tl_exp, tl_fma, tl_log
from kernels.bits import bits, digest, same_bits
from kernels.runtime import tl, triton

needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
HERE = runtime.device()
INF, NAN, TINY, HUGE = math.inf, math.nan, 2.0**-149, 2.0**128 - 2.0**104
KINDS = ("exp", "exp_nonpositive", "log", "fma")
PYTHON = {"exp": exp, "exp_nonpositive": exp, "log": log}
LARGEST_ERROR = {"exp": 0.987, "log": 0.922}  # ulp, as the docstring says


def float32(*values):
    return torch.tensor(values, dtype=torch.float32)


# the fused multiply-add against exact fractions

def rounded(value: Fraction, zero=0.0) -> float:
    """The float32 nearest to an exact value, ties to even; `zero` is the zero to take for none at all."""
    if not value:
        return zero
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    step = Fraction(2) ** max(exponent - 23, -149)
    result = round(value / step) * step
    return math.copysign(float(result) if abs(result) < 2**128 else INF, value)


def exact_fma(a, b, c) -> float:
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c
    return rounded(Fraction(a) * Fraction(b) + Fraction(c), zero=a * b + c if a * b == 0 else 0.0)


def naive_fma(a, b, c):
    return (a.double() * b.double() + c.double()).float()


def check_fma(triples):
    a, b, c = torch.tensor(triples, dtype=torch.float32, device=HERE).unbind(-1)
    expected = float32(*(exact_fma(*t) for t in triples))
    assert same_bits(fma(a, b, c).cpu(), expected)


ANY = st.floats(width=32)
MILD = st.floats(-(2.0**40), 2.0**40, width=32)
FEW_BITS = st.builds(math.ldexp, st.integers(-4097, 4097).map(float), st.integers(-30, 30))
AT_THE_EDGE = st.builds(math.ldexp, st.integers(1 - 2**24, 2**24 - 1).map(float),
                        st.sampled_from([-149, -140, -75, 0, 104]))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(*(st.tuples(v, v, v) for v in (ANY, MILD, FEW_BITS, AT_THE_EDGE))), min_size=1, max_size=20))
@example([(0.0, -1.0, -0.0), (0.0, -1.0, 0.0), (2.0, 3.0, -6.0), (INF, 0.0, 1.0), (INF, 1.0, -INF), (NAN, 1.0, 1.0)])
@example([(HUGE, 1.0, 2.0**103), (HUGE, 1.0, 2.0**102), (HUGE, HUGE, -INF), (-HUGE, HUGE, 1.0), (HUGE, 1.0, 1.0)])
@example([(TINY, 0.5, 0.0), (TINY, 0.5, TINY), (TINY, TINY, TINY), (TINY, -TINY, 0.0), (2.0**-75, 2.0**-75, TINY)])
@example([(4097.0, 4097.0, c) for c in (2.0**-40, -(2.0**-40), TINY, -TINY, 0.0)])
def test_fma_is_the_exact_sum_rounded_once(triples):
    check_fma(triples)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 2047), st.floats(0, 1), st.integers(-90, -6), st.sampled_from([-1, 1]),
                          st.sampled_from([0, -60, -130, 90])), min_size=1, max_size=20))
def test_fma_is_exact_where_a_little_decides_a_tie(parts):
    """The product is an odd number of 25 bits, halfway between two float32 numbers, and c too small for float64."""
    triples = []
    for half, share, k, sign, scale in parts:
        i = 2 * half + 1
        j = int((2**24 + share * (2**24 - 2)) / i) | 1
        if 2**24 < i * j < 2**25:
            triples.append((math.ldexp(i, scale), float(j), sign * math.ldexp(1.0, max(k + scale, -149))))
    if triples:
        check_fma(triples)


@settings(deadline=None, max_examples=100)
@given(st.integers(2**23, 2**24 - 2000), st.integers(2**23, 2**24 - 1), st.sampled_from([-1, 1]))
def test_fma_is_exact_where_the_product_is_all_but_half_an_ulp(start, c, sign):
    """i j = 2**47 and little more or less, which float64 loses beside 2**48 c."""
    pairs = [(i, round(2**47 / i)) for i in range(start, start + 2000)]
    triples = [(float(i), float(sign * j), math.ldexp(c, 48)) for i, j in pairs if 0 < abs(i * j - 2**47) < 2**18]
    assume(triples)
    check_fma(triples)


def test_adding_in_float64_would_round_twice():
    """4097 * 4097 lies halfway between two float32 numbers; 2**-40 decides, and float64 has no room for it."""
    a, b, c = float32(4097.0), float32(4097.0), float32(2.0**-40)
    assert naive_fma(a, b, c).item() == 2.0**24 + 2.0**13
    assert fma(a, b, c).item() == 2.0**24 + 2.0**13 + 2 == exact_fma(4097.0, 4097.0, 2.0**-40)
    assert fma(a, b, -c).item() == 2.0**24 + 2.0**13 == exact_fma(4097.0, 4097.0, -(2.0**-40))


@pytest.mark.parametrize("shapes", [
    ((), (), ()), ((3, 1), (1, 4), (3, 4)), ((5,), (2, 3, 5), (3, 1)), ((0, 4), (4,), ()),
    ((300, 1), (1, 400), (300, 400)), ((1,), (40000,), ()), ((2, 1), (1, 30000), (1, 1)), ((1, 40000), (1, 1), ())])
def test_fma_broadcasts(shapes):
    a, b, c = (torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes))
    result = fma(a, b, c)
    assert result.shape == torch.broadcast_shapes(*shapes)
    wide = [v.contiguous().flatten() for v in torch.broadcast_tensors(a, b, c)]
    assert same_bits(result.flatten(), elementary._fma(*wide))


def test_a_number_is_rounded_to_float32_first():
    x = float32(1.0, 3.0, -7.5)
    for number in (0.1, 3, 1e-50, 1e300):
        same = float32(number)
        assert same_bits(fma(x, number, x), fma(x, same, x))
        assert same_bits(fma(number, x, x), fma(same, x, x))
        assert same_bits(fma(x, x, number), fma(x, x, same))
        assert same_bits(fma(x, number, number), fma(x, same, same))


# exp and log against float64

def strata() -> torch.Tensor:
    """int32 patterns in ascending order, sign bit clear: every exponent, and where something happens."""
    generator = torch.Generator().manual_seed(0)
    mantissa = torch.cat([torch.arange(512), torch.arange(2**23 - 512, 2**23), torch.arange(0, 2**23, 4099),
                          torch.randint(0, 2**23, (1000,), generator=generator)])
    everywhere = ((torch.arange(256) << 23)[:, None] + mantissa).flatten()
    points = [math.log(2) * (n + 0.5) for n in range(151)]  # n changes
    points += [1.0, math.sqrt(0.5), math.sqrt(2.0), 0.25, 87.33655, 103.27893, 103.97208, 104.0, 88.72284, 89.0]
    near = (bits(float32(*points)).long()[:, None] + torch.arange(-3000, 3001)).flatten()
    return torch.unique(torch.cat([everywhere, near])).int()


def ulp(z):
    """The distance between float32 numbers where these float64 values lie."""
    exponent = ((z.view(torch.int64) >> 52) & 0x7FF).clamp(1023 - 126, 1023 + 127)
    return ((exponent - 23) << 52).view(torch.float64)


def errors(y, z):
    """|y - z| in ulp; what lies beyond float32 counts as 2**128, and a NaN must be one in both."""
    assert torch.equal(y.isnan(), z.isnan())
    y, z = (v.double().clamp(-(2.0**128), 2.0**128).nan_to_num(0.0) for v in (y, z))
    return (y - z).abs() / ulp(z)


def falls(y):
    """How often y falls from one element to the next; a NaN neither rises nor falls."""
    return int((y[1:] < y[:-1]).sum())


@pytest.mark.parametrize("name", ["exp", "log"])
def test_error_and_order_over_all_exponents(name):
    positive = strata().to(HERE)
    negative = (positive ^ -(2**31)).flip(0)
    for pattern in (positive, negative):
        x = pattern.view(torch.float32)
        y = PYTHON[name](x)
        assert errors(y, getattr(torch, name)(x.double())).max() <= LARGEST_ERROR[name]
        assert falls(y) == 0
    assert positive.numel() > 1_500_000


def test_the_largest_errors_are_as_large_as_the_docstring_says():
    x = float32(float.fromhex("-0x1.77a92ap+2"), float.fromhex("0x1.922fbep+0"))
    assert 0.986 < errors(exp(x[:1]), torch.exp(x[:1].double())).item() <= 0.987
    assert 0.921 < errors(log(x[1:]), torch.log(x[1:].double())).item() <= 0.922


def test_errors_and_falls_are_noticed():
    """Inverse test: a float32 neighbour has an error beyond the bound, infinity instead of HUGE too, a swap falls."""
    y = float32(0.5, 1.0, 3.0, TINY, HUGE)
    assert (errors(torch.nextafter(y, float32(INF)), y.double()) >= 1).all()
    assert errors(float32(HUGE), torch.tensor([1e300], dtype=torch.float64)).item() >= 1
    assert falls(float32(1.0, 3.0, 2.0, NAN, 1.0)) == 1
    with pytest.raises(AssertionError):
        errors(float32(NAN), y[:1].double())


def test_special_values():
    x = float32(-INF, -0.0, 0.0, TINY, -TINY, 88.72283, 88.72284, 89.0, HUGE, INF, NAN, -103.97208, -103.97209, -104.5)
    one = [1.0] * 4
    assert same_bits(exp(x), float32(0.0, *one, 3.40279851902147e38, INF, INF, INF, INF, NAN, TINY, 0.0, 0.0))
    x = float32(1.0, 0.0, -0.0, INF, -INF, NAN, -NAN, -1.0, -TINY, -HUGE)
    assert same_bits(log(x), float32(0.0, -INF, -INF, INF, *[NAN] * 6))


# the docstring, redone with a pencil: exact fractions, one rounding an operation

def pencil_horner(x, coefficients):
    total = coefficients[-1]
    for c in coefficients[-2::-1]:
        total = exact_fma(x, total, c)
    return total


def pencil_exp(x):
    x = min(max(x, -104.0), 89.0)
    n = exact_fma(x, rounded(Fraction(1 / math.log(2))), 12583069.0) - 12583069.0
    high = rounded(Fraction(math.log(2)))
    r = exact_fma(n, -elementary.LN2_REST, exact_fma(n, -high, x))
    s = exact_fma(exact_fma(r, r, 0.0), pencil_horner(r, elementary.EXP), r)
    return rounded(Fraction(rounded(1 + Fraction(s))) * Fraction(2) ** int(n), zero=0.0)


def pencil_log(x):
    m, n = math.frexp(x)
    if bits(float32(m)).item() < bits(float32(math.sqrt(0.5))).item():
        m, n = 2 * m, n - 1
    f = m - 1.0
    return exact_fma(float(n), rounded(Fraction(math.log(2))),
                     exact_fma(exact_fma(f, f, 0.0), pencil_horner(f, elementary.LOG), f))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-110.0, 95.0, width=32), min_size=1, max_size=30))
def test_exp_is_the_pencil_exp(values):
    assert same_bits(exp(float32(*values)), float32(*map(pencil_exp, values)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(TINY, HUGE, width=32) | st.floats(0.5, 2.0, width=32), min_size=1, max_size=30))
def test_log_is_the_pencil_log(values):
    assert same_bits(log(float32(*values)), float32(*map(pencil_log, values)))


def test_ln_2_in_two_pieces():
    assert float32(math.log(2)).item() == elementary.LN2
    assert float32(math.log(2) - elementary.LN2).item() == elementary.LN2_REST


# pinned: the constants, and the bits of a sample of all float32 numbers

def test_the_constants_are_these():
    """Written out: one bit of the last coefficient moves a few results in a million."""
    coefficients = elementary.EXP, elementary.LOG
    assert [[c.hex() for c in some] for some in coefficients] == [[float.fromhex(c).hex() for c in some] for some in (
        ("0x1p-1", "0x1.55548cp-3", "0x1.5558cep-5", "0x1.12475ep-7", "0x1.69fc84p-10"),
        ("-0x1.fffff8p-2", "0x1.555550p-2", "-0x1.000422p-2", "0x1.99a3f6p-3", "-0x1.542810p-3", "0x1.2271b2p-3",
         "-0x1.0f32dap-3", "0x1.08466cp-3", "-0x1.383fcap-4"))]
    assert float32(1 / math.log(2)).item() == elementary.LOG2_E and elementary.MAGIC == 12583069.0
    assert (elementary.LOWEST, elementary.HIGHEST, elementary.SHIFT) == (-104.0, 89.0, 30)
    assert elementary.SQRT_HALF == bits(float32(math.sqrt(0.5))).item() == 0x3F3504F3


def sample() -> torch.Tensor:
    """Every 4099th of the 2**32 patterns from -0 on; and where n of exp and of log changes, the five around it."""
    every = torch.arange(-(2**31), 2**31, 4099)
    steps = bits(float32(*(math.log(2) * (n + 0.5) for n in range(-151, 129)))).long()
    roots = 0x3504F3 + (torch.arange(255) << 23)
    near = (torch.cat([steps, roots])[:, None] + torch.arange(-2, 3)).flatten()
    return torch.cat([every, near]).int().view(torch.float32).to(HERE)


DIGESTS = {"exp": "e73ec70f2adb91ff229fe9aeea0b50a31ea2130c46eb0c4a9430d029ed760ddb",
           "log": "e836e7b29886f8d9f452f2afe6d78c7d11f28f4fa0727273cb55eaeb45520a73"}


@pytest.mark.parametrize("name", DIGESTS)
def test_the_bits_of_the_sample_are_these(name):
    assert digest(PYTHON[name](sample())) == DIGESTS[name]


@needs_triton
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize("name", DIGESTS)
def test_a_kernels_bits_of_the_sample_are_these(name):
    assert digest(run(name, sample())) == DIGESTS[name]


# calls

@pytest.mark.parametrize("function", [exp, log])
def test_any_shape_and_stride(function):
    x = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(1))
    flat = function(x.flatten())
    assert same_bits(function(x), flat.view(x.shape))
    assert same_bits(function(x.transpose(0, 2)), flat.view(x.shape).transpose(0, 2).contiguous())
    assert same_bits(function(x[:, ::2, 3]), flat.view(x.shape)[:, ::2, 3].contiguous())
    assert function(x[0, 0, 0]).shape == () and function(x[:0]).shape == (0, 5, 7)
    wide = x[:1, :, :1].expand(900, 5, 7)
    assert same_bits(function(wide), flat.view(x.shape)[:1, :, :1].expand(900, 5, 7))


@pytest.mark.parametrize("call", [exp, log, lambda x: fma(x, x, 1.0)])
def test_long_tensors_in_slices_keep_every_element(call):
    x = torch.randn(3 * elementary.SLICE + 5, generator=torch.Generator().manual_seed(2))
    assert same_bits(call(x), torch.cat([call(part) for part in x.split(1000)]))


@pytest.mark.parametrize("call, error, words", [
    (lambda x: exp(x.double()), TypeError, "x must be float32, got torch.float64"),
    (lambda x: log(x.bfloat16()), TypeError, "x must be float32, got torch.bfloat16"),
    (lambda x: exp(1.0), TypeError, "x must be a tensor, got float"),
    (lambda x: fma(x, x.half(), x), TypeError, "b must be float32, got torch.float16"),
    (lambda x: fma(x, x, None), TypeError, "c must be a tensor, got NoneType"),
    (lambda x: fma(x, torch.empty(3, device="meta"), 1.0), ValueError, "a, b and c must be on one device, got .*meta"),
    (lambda x: fma(1.0, 2.0, 3.0), TypeError, "a, b or c must be a tensor"),
    (lambda x: fma(x, x[:2], x), ValueError, r"a, b and c must broadcast, got shapes \(3,\), \(2,\), \(3,\)"),
    (lambda x: exp(x.clone().requires_grad_()), RuntimeError, "x requires a gradient"),
    (lambda x: fma(x, 1.0, x.clone().requires_grad_()), RuntimeError, "c requires a gradient"),
])
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(float32(1.0, 2.0, 3.0))


def test_without_gradients_a_parameter_is_welcome():
    x = float32(1.0).requires_grad_()
    with torch.no_grad():
        assert same_bits(exp(x), exp(x.detach()))


def test_without_triton_the_functions_run():
    code = ("import sys; sys.modules['triton'] = None; import torch\n"
            "from kernels.arithmetic.elementary import exp, log\nprint(log(exp(torch.ones(1))).item())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == 1.0


# in a kernel

@triton.jit
def _kernel(x_ptr, a_ptr, b_ptr, y_ptr, KIND: tl.constexpr, WIDTH: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(x_ptr + i)
    if KIND == "exp":
        y = tl_exp(x)
    elif KIND == "exp_nonpositive":
        y = tl_exp(x, NONPOSITIVE=True)
    elif KIND == "log":
        y = tl_log(x)
    else:
        y = tl_fma(tl.load(a_ptr + i), tl.load(b_ptr + i), x)
    tl.store(y_ptr + i, y)


def run(kind, x, a=None, b=None):
    width = 1024 if x.is_cuda else 1 << 18
    padded = [torch.nn.functional.pad(x if v is None else v, (0, -len(x) % width)) for v in (x, a, b)]
    y = torch.empty_like(padded[0])
    options = {"num_warps": 4, "enable_fp_fusion": False} if x.is_cuda else {}
    _kernel[(len(y) // width,)](*padded, y, kind, width, **options)
    return y[: len(x)]


@needs_triton
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # NumPy in the interpreter, on NaN and inf
@pytest.mark.parametrize("kind", ["exp", "exp_nonpositive", "log"])
def test_a_kernel_has_the_bits_of_python(kind):
    pattern = strata()[:: 1 if HERE.type == "cuda" else 4].to(HERE)
    x = pattern.view(torch.float32)
    for signed in [-x] if kind == "exp_nonpositive" else [x, -x]:
        assert same_bits(run(kind, signed), PYTHON[kind](signed))


@needs_triton
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize("exponents", [255, 40, 3])
def test_a_kernels_fma_has_the_bits_of_python(exponents):
    """Any exponents, and so close together that sums cancel and round."""
    generator = torch.Generator().manual_seed(exponents)
    count = 1 << (24 if HERE.type == "cuda" else 18)
    mantissa = torch.randint(0, 2**23, (3, count), generator=generator)
    mantissa[:, ::2] &= -4096  # products of few bits: ties
    exponent = torch.randint(128 - (exponents + 1) // 2, 128 + (exponents + 1) // 2, (3, count), generator=generator)
    sign = torch.randint(0, 2, (3, count), generator=generator)
    a, b, c = ((sign << 31) + (exponent << 23) + mantissa).int().view(torch.float32).to(HERE)
    assert same_bits(run("fma", c, a, b), fma(a, b, c))
    if exponents == 255:
        assert fma(a, b, c).isnan().any() and fma(a, b, c).isinf().any()


def hard_triples():
    """(a, b, c) of both signs: a b halfway between two float32 numbers and a small c; a b nearly half an ulp of c."""
    halfway = [(math.ldexp(i, scale), float(j), math.ldexp(1.0, k + scale)) for i, j in ((4097, 4097), (5793, 5791))
               for scale in (-60, 0, 60) for k in (-6, -28, -29, -31, -40, -89)]
    pairs = [(i, round(2**47 / i)) for i in range(9000000, 9003000)]
    half = [(float(i), float(j), math.ldexp(c, 48)) for i, j in pairs if 0 < abs(i * j - 2**47) < 2**18
            for c in (2**23, 2**23 + 1, 2**24 - 1)]
    return [(a, sign * b, other * c) for a, b, c in halfway + half for sign in (1, -1) for other in (1, -1)]


@needs_triton
def test_a_kernels_fma_is_rounded_once_where_float64_would_round_twice():
    triples = hard_triples()
    a, b, c = (float32(*column).to(HERE) for column in zip(*triples, strict=True))
    exact = float32(*(exact_fma(*t) for t in triples))
    assert same_bits(run("fma", c, a, b).cpu(), exact)
    wrong = (naive_fma(a, b, c).cpu() != exact).view(-1, 4).sum(0)
    assert len(triples) > 200 and (wrong > 20).all(), "inverse: hard for every choice of signs"


def _compile(targets):
    """Each kind's PTX by target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**dict.fromkeys(("x_ptr", "a_ptr", "b_ptr", "y_ptr"), "*fp32"),
                 "KIND": "constexpr", "WIDTH": "constexpr"}
    return {f"{kind} {target}": triton.compile(
        ASTSource(_kernel, signature, {"KIND": kind, "WIDTH": 128}), target=GPUTarget("cuda", target, 32),
        options={"num_warps": 4, "enable_fp_fusion": False}).asm["ptx"] for kind in KINDS for target in targets}


@pytest.fixture(scope="module")
def ptx():
    if not runtime.HAS_TRITON:
        pytest.skip("compiling ahead of time needs Triton")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True,
                          env={**os.environ, "TRITON_INTERPRET": "0"}, cwd=Path(__file__).parents[2])
    return json.loads(done.stdout)


def instructions(code):
    """The instructions between the last load and the store, less those on addresses: one number a thread."""
    code = code[code.rindex("ld.global") : code.index("st.global")]
    lines = [line.split("//")[0].strip() for line in code.splitlines()[1:]]
    made = [line.split()[0] for line in lines if line.endswith(";") and line[0] not in ".@"]
    return [name for name in made if not name.endswith("64")]


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("kind, fused, at_most", [
    ("exp_nonpositive", 9, 14), ("exp", 9, 19), ("log", 10, 31), ("fma", 1, 1)])
def test_a_kernel_is_made_of_ieee_instructions(ptx, kind, target, fused, at_most):
    code = ptx[f"{kind} {target}"]
    made = instructions(code)
    assert made.count("fma.rn.f32") == fused == code.count("fma.rn.f32")
    assert len(made) <= at_most, made
    for word in (".ftz", "approx", "ex2", "lg2", "div", "call", ".f64"):
        assert word not in code.split(".section")[0], word


# every float32

@pytest.mark.gpu
@pytest.mark.parametrize("name", ["exp", "log"])
def test_every_float32(name):
    """All 2**32 patterns: a kernel's bits are python's, the error is as stated, and nothing falls."""
    step, worst = 1 << 26, 0.0
    for sign in (0, -(2**31)):
        last = None
        for start in range(0, 2**31, step):
            pattern = torch.arange(start, start + step, device="cuda").int()
            x = (pattern + sign).view(torch.float32)
            y = PYTHON[name](x)
            assert same_bits(run(name, x), y), (sign, start)
            if name == "exp" and sign:
                assert same_bits(run("exp_nonpositive", x), y), start
            worst = max(worst, errors(y, getattr(torch, name)(x.double())).max().item())
            run_on = y if last is None else torch.cat([last, y])
            assert falls(run_on.flip(0) if sign else run_on) == 0, (sign, start)  # a negative x sinks
            last = y[-1:]
    assert LARGEST_ERROR[name] - 0.001 < worst <= LARGEST_ERROR[name]


@pytest.mark.gpu
def test_a_gpu_has_the_bits_of_a_cpu():
    x = strata().view(torch.float32)
    for function in (exp, log):
        for v in (x, -x):
            assert same_bits(function(v), function(v.cuda()))
    a, b, c = torch.randn(3, 1 << 20, generator=torch.Generator().manual_seed(3))
    assert same_bits(fma(a, b, c), fma(a.cuda(), b.cuda(), c.cuda()))


@pytest.mark.gpu
def test_a_cuda_graph_can_hold_them():
    x = torch.rand(1000, device="cuda")
    call = {"exp": lambda: exp(-x), "log": lambda: log(x), "fma": lambda: fma(x, x, 0.5)}
    for name, function in call.items():
        function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = function()
        x.copy_(torch.rand(1000, device="cuda"))
        graph.replay()
        assert same_bits(y, function()), name


if __name__ == "__main__":
    print(json.dumps(_compile((80, 90))))
