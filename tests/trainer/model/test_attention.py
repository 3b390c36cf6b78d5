"""Packed attention equals attention on each document alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medtrain.trainer.data.batch import pair_batch, windows_batch
from medtrain.trainer.data.pairs import PairSet
from medtrain.trainer.model.attention import packed_layout, varlen_attention

LENGTHS = [5, 30, 7, 64, 1, 2, 33, 31]


def qkv(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def layout(lengths=LENGTHS):
    return packed_layout(windows_batch([np.zeros(n + 1, dtype=np.int32) for n in lengths]), "sdpa")


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


def _lower_right(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):  # torch 2.11 has no groups
    """What torch's variable-length kernel computes: its causal mask is aligned to the bottom right."""
    assert window_size == (-1, 0) and cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    pieces = []
    for s in range(len(cu_q) - 1):
        rows = [t[cu[s] : cu[s + 1]].transpose(0, 1) for t, cu in ((q, cu_q), (k, cu_k), (v, cu_k))]
        mask = torch.ones(rows[0].shape[1], rows[1].shape[1], dtype=torch.bool)
        mask = mask.tril(mask.shape[1] - mask.shape[0])
        out = F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        pieces.append(out.transpose(0, 1))
    return torch.cat(pieces)


def test_the_flash_backends_are_given_the_keys_of_prompt_and_completion(monkeypatch):
    monkeypatch.setattr("medtrain.trainer.model.attention.varlen_attn", _lower_right)
    words = [np.arange(n, dtype=np.int32) for n in (7, 5, 1, 9, 1, 3, 20)]
    offsets = np.concatenate([[0], np.cumsum([len(w) for w in (words[:3] + words[:1] + words[3:5] + words[4:])])])
    tokens = np.concatenate(words[:3] + words[:1] + words[3:5] + words[4:])
    pairs = PairSet("p", None, "", tokens, offsets, np.arange(3), "", {}, {})
    batch = pair_batch([pairs], [(0, 0), (0, 1), (0, 2)])
    assert len(batch.cu_seqlens) < 1 + 6 and batch.key_index is not None
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(batch.input_ids), heads, 8) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    weights = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    found = []
    for backend in ("sdpa", "torch_varlen"):
        out = attend(q, k, v, packed_layout(batch, backend))
        found.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
