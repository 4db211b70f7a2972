"""Attention's gradients: near float64's, the specification's bits from every schedule, each sequence on its own."""
import pytest
import torch
from backward_cases import BF16, F32, HERE, farthest, float64, needs_triton, numbers

from kernels.bits import same_bits
from kernels.ops.attention import Sequences
from kernels.ops.attention.op import attention_prefill
from kernels.training.attention import Schedule, attention_backward

SCHEDULES = [Schedule(), Schedule(16, 32), Schedule(32, 16, 2, 1), Schedule(128, 64, 8, 2)]


def case(length, sequences=1, heads=2, kv_heads=1, width=16, device=HERE):
    """q, k, v, y, lse, dy, length; columns have different sizes, so that no sum is exact."""
    shape, size = (length * sequences, width), (torch.arange(width, device=device) * 5 % 9 - 4).float().exp2()
    q, dy = (numbers((shape[0], heads, width), BF16, seed, 1, device) for seed in (1, 4))
    k, v = (numbers((shape[0], kv_heads, width), BF16, seed, 0, device) * size.to(BF16) for seed in (2, 3))
    call = attention_prefill.triton if torch.device(device).type == "cuda" else attention_prefill.python
    cached = (t.unflatten(0, (sequences, length)) for t in (k, v))
    y, lse = call(q, *cached, Sequences([length] * sequences, [length] * sequences, device), 0, True)
    return q, k, v, y, lse, dy, length


def plain(q, k, v, length):
    """Causal attention, heads of q on shared heads of k."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    unseen = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(unseen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("heads, kv_heads, width", [(1, 1, 16), (4, 2, 32), (4, 1, 64)])
def test_the_gradients(heads, kv_heads, width):
    """Weights, their gradients and the result are rounded to bfloat16, so that sums of 70 of them are allowed more."""
    given = case(70, 2, heads, kv_heads, width)
    exact = float64(*given[:3])
    wanted = torch.autograd.grad(plain(*exact, 70), exact, given[5].double())
    for found, want in zip(attention_backward.python(*given), wanted, strict=True):
        assert float((found.double() - want).norm() / want.norm()) < 2.0**-7
        assert farthest(found, want, F32, more=2.0**13) <= 1


@needs_triton
@pytest.mark.parametrize("schedule", SCHEDULES[1:3] if HERE.type == "cpu" else SCHEDULES, ids=str)
def test_a_schedule_has_the_specifications_bits(schedule):
    given = case(37, 1, 2, 1)
    assert same_bits(attention_backward.call.run_schedule(schedule, *given), attention_backward.python(*given))


@needs_triton
def test_the_schedule_of_choice_has_them_too():
    given = case(20, 2, 2, 2)
    assert same_bits(attention_backward.triton(*given), attention_backward.python(*given))


def cut(given, tokens):
    return *(t[tokens] for t in given[:6]), len(given[0][tokens])


@pytest.mark.parametrize("name", ["python", pytest.param("triton", marks=needs_triton)])
def test_a_sequence_has_the_same_bits_alone(name):
    given = case(18, 3)
    whole = attention_backward.implementation(name)(*given)
    alone = attention_backward.implementation(name)(*cut(given, slice(18, 36)))
    assert same_bits([t[18:36] for t in whole], alone)


def test_a_querys_gradient_knows_no_later_position():
    given = case(80)
    assert same_bits(attention_backward.python(*given)[0][:33], attention_backward.python(*cut(given, slice(0, 33)))[0])


def test_a_keys_gradient_knows_no_earlier_query():
    given = case(80)
    q, k, v, y, lse, dy, length = given
    other = dy.clone()
    other[:32] = 3.0
    changed = attention_backward.python(q, k, v, y, lse, other, length)
    kept = attention_backward.python(*given)
    assert same_bits([t[32:] for t in changed[1:]], [t[32:] for t in kept[1:]])
    assert not same_bits(changed[2][:32], kept[2][:32])


@needs_triton
def test_strides_are_followed():
    q, k, v, y, lse, dy, length = case(20, 1, 2, 2)
    both = torch.cat([q, k, v], 1)
    q_, k_, v_ = both[:, :2], both[:, 2:4], both[:, 4:]
    turned = dy.transpose(0, 2).contiguous().transpose(0, 2)
    assert same_bits(attention_backward.triton(q_, k_, v_, y, lse, turned, length),
                     attention_backward.python(q, k, v, y, lse, dy, length))
    wide = torch.stack([q, q], -1)[..., 0]
    assert same_bits(attention_backward.triton(wide, k, v, y, lse, dy, length),
                     attention_backward.python(q, k, v, y, lse, dy, length))


GOOD = dict(zip(("q", "k", "v", "y", "lse", "dy", "length"), case(4, 2, 4, 2), strict=True))
BAD = {"q a list": (dict(q=[1.0]), TypeError, "q .*list"),
       "q of two dimensions": (dict(q=numbers((8, 64))), ValueError, r"q .*\(8, 64\)"),
       "q of a width that has no kernel": (dict(q=numbers((8, 4, 24))), ValueError, "q .*16, 32, 64, 128.*24"),
       "q float32": (dict(q=numbers((8, 4, 16), F32)), TypeError, "q .*bfloat16.*float32"),
       "heads that do not divide": (dict(k=numbers((8, 3, 16))), ValueError, "q .*3 heads, got 4"),
       "v of fewer tokens": (dict(v=numbers((7, 2, 16))), ValueError, r"v .*\(8, 2, 16\), got \(7, 2, 16\)"),
       "y of another shape": (dict(y=numbers((8, 2, 16))), ValueError, r"y .*\(8, 4, 16\)"),
       "dy of another dtype": (dict(dy=numbers((8, 4, 16), F32)), TypeError, "dy .*bfloat16"),
       "lse rounded": (dict(lse=numbers((8, 4))), TypeError, "lse .*float32.*bfloat16"),
       "a length that does not divide": (dict(length=3), ValueError, "length .*8 tokens, got 3"),
       "a length of 0": (dict(length=0), ValueError, "length .*got 0"),
       "a length that is no number": (dict(length=4.0), ValueError, "length .*got 4.0")}


@pytest.mark.parametrize("name", ["python", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("change, error, says", BAD.values(), ids=BAD)
def test_bad_arguments_are_named(change, error, says, name):
    with pytest.raises(error, match=says):
        attention_backward.implementation(name)(**GOOD | change)


@pytest.mark.gpu
@pytest.mark.parametrize("length, sequences, heads, kv_heads, width", [
    (1, 3, 2, 1, 16), (63, 2, 2, 2, 128), (200, 2, 4, 1, 64)])
def test_a_gpus_kernels_have_a_cpus_bits(length, sequences, heads, kv_heads, width):
    """Each schedule takes seconds to compile: all of them in the byte model's width."""
    given = case(length, sequences, heads, kv_heads, width)
    wanted = attention_backward.python(*(t.cpu() for t in given[:6]), length)
    for schedule in SCHEDULES if width == 64 else SCHEDULES[:1]:
        found = attention_backward.call.run_schedule(schedule, *given)
        assert same_bits([t.cpu() for t in found], wanted), schedule


@pytest.mark.gpu
def test_a_training_batchs_sequences_have_the_same_bits_alone():
    given = case(1024, 32, 4, 1, 64)
    whole, again = attention_backward.triton(*given), attention_backward.triton(*given)
    assert same_bits(whole, again)
    own = slice(7 * 1024, 8 * 1024)
    alone = cut(given, own)
    assert same_bits([t[own] for t in whole], attention_backward.triton(*alone))
    assert same_bits([t[own] for t in whole], attention_backward.python(*alone))
