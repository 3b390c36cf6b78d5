"""Packed attention equals attention on each document alone."""

import pytest
import torch
import torch.nn.functional as F

from medtrain.trainer.attention import packed_layout, varlen_attention

LENGTHS = [5, 30, 7, 64, 1, 2, 33, 31]


def qkv(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def layout(lengths=LENGTHS):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return packed_layout(bounds, max(lengths), "sdpa", torch.device("cpu"))


def attend(q, k, v, where):
    rows = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
    return varlen_attention(None, *rows, None, scaling=0.3, layout=where)[0][0]


def alone(q, k, v):
    pieces = []
    for part in zip(*(t.split(LENGTHS) for t in (q, k, v)), strict=True):
        rows = [t.transpose(0, 1).unsqueeze(0) for t in part]
        out = F.scaled_dot_product_attention(*rows, is_causal=True, scale=0.3, enable_gqa=True)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


def test_values_and_gradients_equal_each_document_alone():
    q, k, v = qkv()
    weights = torch.randn(sum(LENGTHS), 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packed, single = attend(q, k, v, layout()), alone(q, k, v)
    torch.testing.assert_close(packed, single, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((packed * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((single * weights).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_changed_document_leaves_the_others_bitwise_unchanged():
    q, k, v = (t.detach() for t in qkv(torch.float32))
    before = attend(q, k, v, layout())
    changed = [t.clone() for t in (q, k, v)]
    first, last = sum(LENGTHS[:3]), sum(LENGTHS[:4])
    for t in changed:
        t[first:last] += 1.0
    after = attend(*changed, layout())
    same = torch.ones(sum(LENGTHS), dtype=torch.bool)
    same[first:last] = False
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])


def test_calls_that_would_be_another_computation_are_refused():
    q, k, v = (t.detach().transpose(0, 1).unsqueeze(0) for t in qkv())
    for options in ({"layout": None}, {"layout": layout(), "dropout": 0.1}, {"layout": layout(), "sliding_window": 4}):
        with pytest.raises(ValueError):
            varlen_attention(None, q, k, v, None, scaling=1.0, **options)
    with pytest.raises(ValueError):
        varlen_attention(None, q, k, v, torch.ones(1), scaling=1.0, layout=layout())
