"""Attention comes to PyTorch in one form, so that it chooses one kernel alone and in a batch."""
from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from playing import K, Q

from kernels import runtime
from kernels.bits import portable, same_bits
from kernels.mode import Refused, batch_invariant, masks, whole_attention

DEVICE = runtime.device()
DTYPES = (torch.float32, torch.bfloat16)
attend = F.scaled_dot_product_attention


def _some(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    *lead, width = shape
    return portable(torch.Size(lead).numel(), width, dtype, DEVICE, seed).view(shape)


def _apart(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, those of a head not together."""
    return t.mT.contiguous().mT


SHARED = {"enable_gqa": True}
FORMS = {
    "two dimensions": ((5, 8), (6, 8), {}), "three": ((3, 5, 8), (3, 6, 8), {}), "shared": ((3, 5, 8), (6, 8), {}),
    "a shared batch": ((2, 3, 5, 8), (3, 6, 8), {}), "one head": ((2, 4, 5, 8), (2, 1, 6, 8), {}),
    "five": ((2, 2, 4, 5, 8), (2, 4, 6, 8), {}), "groups": ((2, 4, 5, 8), (2, 2, 6, 8), SHARED),
    "three in groups": ((4, 5, 8), (2, 6, 8), SHARED), "shared groups": ((2, 4, 5, 8), (1, 2, 6, 8), SHARED),
    "five in groups": ((2, 3, 4, 5, 8), (2, 3, 2, 6, 8), SHARED), "no queries": ((2, 4, 0, 8), (2, 4, 6, 8), {}),
    "a mask": ((2, 4, 5, 8), (1, 4, 6, 8), {"attn_mask": torch.ones(5, 6, dtype=torch.bool).tril(1)}),
    "a mask for three": ((3, 5, 8), (3, 6, 8), {"attn_mask": torch.ones(3, 1, 6, dtype=torch.bool)}),
    "a mask for five": ((2, 2, 4, 5, 8), (2, 2, 4, 6, 8),
                        {"attn_mask": torch.ones(2, 1, 1, 5, 6, dtype=torch.bool).tril()}),
    "a mask of one dimension": ((2, 4, 5, 8), (2, 4, 6, 8), {"attn_mask": torch.ones(6, dtype=torch.bool)}),
    "a mask of more": ((1, 4, 5, 8), (1, 4, 6, 8), {"attn_mask": torch.ones(3, 1, 5, 6, dtype=torch.bool)}),
    "batches that do not fit": ((3, 4, 5, 8), (2, 4, 6, 8), {}), "one dimension": ((8,), (8,), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_shapes_numbers_and_errors_are_pytorchs(form):
    of_q, of_k, named = FORMS[form]
    named = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in named.items()}
    q, k = _some(*of_q), _some(*of_k, seed=1)
    try:
        expected = attend(q, k, k, **named)
    except Exception as error:  # noqa: BLE001 - whatever it is
        with pytest.raises(type(error), match=re.escape(str(error)[:40])), batch_invariant():
            attend(q, k, k, **named)
        return
    with batch_invariant(strict=True):
        y = attend(q, k, k, **named)
    assert y.shape == expected.shape and y.is_contiguous()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sharing_dimensions_and_strides_move_no_bit(dtype):
    q, k, v = (_some(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(((6, 4, 5, 16), *[(4, 9, 16)] * 2)))
    with batch_invariant(strict=True):
        alone = torch.cat([attend(one[None], k[None], v[None]) for one in q])
        for y in (attend(q, k, v), attend(q, k[None], v.expand(6, -1, -1, -1)), attend(q.view(3, 2, 4, 5, 16), k, v),
                  torch.stack([attend(one, k, v) for one in q]), attend(_apart(q), _apart(k), _apart(v)),
                  torch.stack([attend(q[:, h], k[h], v[h]) for h in range(4)], 1)):
            assert same_bits(y.reshape(alone.shape), alone)


def test_strides_move_no_gradient():
    given = [_some(2, 4, 5, 16, seed=seed) for seed in range(4)]

    def gradients(make):
        tensors = [make(t).requires_grad_() for t in given[:3]]
        attend(*tensors).backward(given[3])
        return [t.grad for t in tensors]
    with batch_invariant(strict=True):
        expected = gradients(torch.clone)
        assert same_bits(gradients(_apart), expected)
    torch.testing.assert_close(gradients(torch.clone), expected)


def test_results_lie_where_models_look():
    y = _some(2, 4, 3, 8)
    with batch_invariant(strict=True):
        assert attend(y, y, y).view(2, -1).shape == (2, 96)
        assert (y[0, 0] @ y.mT).view(2, -1).shape == (2, 36) and y.mT.exp().mT.view(-1).shape == (192,)
        last = y.contiguous(memory_format=torch.channels_last).sigmoid()
        assert last.is_contiguous(memory_format=torch.channels_last)
        for f in (lambda x: torch.atan2(x, x), lambda x: torch.atan2(x, x[0, 0]), lambda x: torch.atan2(x[0, 0], x),
                  lambda x: torch.atan2(torch.ones((), device=DEVICE), x)):
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C._dispatch_key_parse("Fake"))):
                expected = f(y.mT)
            assert f(y.mT).stride() == expected.stride()


K4, CAUSAL = K.repeat_interleave(2, 1), torch.ones(5, 5, dtype=torch.bool).tril()


@pytest.fixture
def readings(monkeypatch):
    """-> the masks that were read, not compared."""
    found, read = [], masks._read
    monkeypatch.setattr(masks, "_read", lambda mask, *sizes: (found.append(mask), read(mask, *sizes))[1])
    monkeypatch.setattr(masks, "_alike", lambda known, mask: [])
    masks._LAST.clear()
    return found


def test_layers_that_share_a_mask_read_it_once(attention, readings):
    mask, known = CAUSAL.clone(), []
    with batch_invariant(strict=True), torch.no_grad():
        for _ in range(5):
            attend(Q, K4, K4, attn_mask=mask)
            known.append(len(readings))
        assert [kind for kind, *_ in attention] == ["looked at"] * 2 + ["launched"] * 3  # the rule's, and the step's
        assert known == [1, 2, 2, 2, 2]  # of PyTorch's copy, then the mask itself
        mask[4, 4] = False
        attend(Q, K4, K4, attn_mask=mask)
        assert len(readings) == 3 and attention[-1][0] == "looked at"


@pytest.mark.parametrize("seen", ["causal", "padded on the left", "padded on the right", "a window"])
def test_a_mask_says_what_pytorchs_copy_of_it_does(gpu, monkeypatch, seen):
    """Those whose keys must be shifted, or whose queries see none, are attended as by the rule."""
    mask = torch.ones(6, 6, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    if "left" in seen:
        mask[0, ..., :2] = False
    elif "right" in seen:
        mask[0, ..., 4:] = False
    elif seen == "a window":
        mask &= torch.ones(6, 6, dtype=torch.bool).triu(-2)
    q, k, v = (_some(2, 4, 6, 8, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    steps, step = [], whole_attention._masked
    def counted(*given, **named):
        steps.append(given)
        return step(*given, **named)
    monkeypatch.setattr(whole_attention, "_masked", counted)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: False))  # the specification's numbers
    monkeypatch.setattr(whole_attention, "keep_attention", lambda *given: None)
    with batch_invariant(strict=True), torch.no_grad():
        first = attend(q, k, v, attn_mask=mask)
        second = attend(q, k, v, attn_mask=mask)
    assert len(steps) == 1 and same_bits(second, first) and second.stride() == first.stride()


def test_masks_without_an_order_and_other_dtypes_are_no_step(attention, readings):
    with batch_invariant(strict=True), torch.no_grad():
        attend(Q, K4, K4, attn_mask=CAUSAL)
        dense = CAUSAL.clone()
        dense[4, 2] = False
        with pytest.raises(Refused, match="attn_mask is dense in another way"):
            attend(Q, K4, K4, attn_mask=dense)
    for tensors, named in (((Q.double(), K4.double(), K4.double()), {}), ((Q, K4, K4), {"scale": 0.3}),
                           ((Q[..., :4], K4[..., :4], K4[..., :4]), {})):
        assert whole_attention.leave_attention("a key", *tensors, attn_mask=CAUSAL, **named) is None
    learned = torch.zeros(5, 5, requires_grad=True)
    assert whole_attention.attention_key(Q, K4, K4, learned) is None
    with torch.no_grad():
        keys = [whole_attention.attention_key(Q, K4, K4, learned, scale=scale) for scale in (None, 0.3)]
    assert None not in keys and keys[0] != keys[1]
