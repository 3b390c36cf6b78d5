"""Causal attention over packed documents, one face over three backends; documents never see each other.

The model is called on one flat row of tokens [1, T]; a :class:`PackedLayout` says where each document begins. The
backend is chosen once by :func:`select_backend`, printed, and written into the manifest:

- ``flash_attn``: the flash-attn package, where installed, on CUDA in half precision;
- ``torch_varlen``: torch's own variable-length flash attention, on CUDA in half precision;
- ``sdpa``: documents of like length gathered into padded rows, each row plain causal attention. Padding stands at the
  end of a row, where causality alone keeps it out of every real token's sight. Right on any device and dtype.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "medtrain_varlen"  # the attn_implementation of every model that medtrain builds


def select_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for this device and compute dtype: ``flash_attn``, ``torch_varlen`` or ``sdpa``."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        with contextlib.suppress(
            ImportError, AttributeError
        ):  # other packages share the name flash_attn; only the function counts
            importlib.import_module("flash_attn").flash_attn_varlen_func  # noqa: B018
            return "flash_attn"
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "torch_varlen"
    return "sdpa"


@dataclass(frozen=True)
class PackedLayout:
    """Where the documents of one packed row lie, prepared once a micro-batch and used by every layer.

    Attributes:
        backend: one of the names above.
        cu_seqlens: int32 [D + 1], document d is tokens cu_seqlens[d] to cu_seqlens[d + 1].
        max_seqlen: tokens of the longest document.
        groups: for ``sdpa``: one (rows, length, index) a group of documents of like length; index [rows * length] gives
            the token at each place, a document's last token standing in for padding.
        inverse: for ``sdpa``: [T], the place of each token in the groups laid end to end.
    """

    backend: str
    cu_seqlens: torch.Tensor
    max_seqlen: int
    groups: tuple[tuple[int, int, torch.Tensor], ...] = ()
    inverse: torch.Tensor | None = None


def packed_layout(cu_seqlens: torch.Tensor, max_seqlen: int, backend: str, device: torch.device) -> PackedLayout:
    """Build the layout of one packed row from ``cu_seqlens`` (int32 [D + 1])."""
    if backend != "sdpa":
        return PackedLayout(backend, cu_seqlens.to(device, non_blocking=True), max_seqlen)
    bounds = cu_seqlens.cpu().long()  # planned on the host, wherever the batch is
    starts, lengths = bounds[:-1], bounds.diff()
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    groups, inverse, placed, first = [], torch.empty(int(bounds[-1]), dtype=torch.long), 0, 0
    while first < len(sorted_lengths):
        longest = sorted_lengths[first]
        # A new group costs some kernel launches, padding costs work: allow a quarter, or a few tokens.
        shortest = longest - max(8, longest // 4)
        last = first
        while last < len(sorted_lengths) and sorted_lengths[last] >= shortest:
            last += 1
        documents = order[first:last]
        column = torch.arange(longest)
        real = column < lengths[documents, None]
        index = starts[documents, None] + torch.minimum(column, lengths[documents, None] - 1)
        place = placed + torch.arange(index.numel()).view_as(index)
        inverse[index[real]] = place[real]
        groups.append((last - first, longest, index.reshape(-1).to(device)))
        placed += index.numel()
        first = last
    return PackedLayout(backend, cu_seqlens.to(device), max_seqlen, tuple(groups), inverse.to(device))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scale: float) -> torch.Tensor:
    """q [T, heads, dim], k and v [T, kv_heads, dim] -> [T, heads, dim]."""
    grouped = k.shape[1] != q.shape[1]
    if len(layout.groups) == 1 and layout.groups[0][0] == 1:  # one document: nothing to gather
        rows = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.squeeze(0).transpose(0, 1)
    pieces = []
    for rows, length, index in layout.groups:
        padded = [t.index_select(0, index).view(rows, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*padded, is_causal=True, scale=scale, enable_gqa=grouped)
        pieces.append(out.transpose(1, 2).reshape(rows * length, *q.shape[1:]))
    return torch.cat(pieces).index_select(0, layout.inverse)


def _torch_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options = {}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            repeat = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    # window_size=(-1, 0) is how this function spells causal.
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=(-1, 0), **options)


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scale: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    cu, longest = layout.cu_seqlens, layout.max_seqlen
    return flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # its backward adds up in any order otherwise
    )  # fmt: skip


_BACKENDS = {"sdpa": _sdpa, "torch_varlen": _torch_varlen, "flash_attn": _flash_attn}


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    layout: PackedLayout | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention: query [1, heads, T, dim] -> ([1, T, heads, dim], None).

    A missing layout, a mask, dropout or a window would silently be another computation, so each is refused.
    """
    if layout is None or attention_mask is not None or dropout or sliding_window is not None:
        raise ValueError("packed attention takes a layout and no mask, dropout or sliding window")
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    return _BACKENDS[layout.backend](q, k, v, layout, scaling).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(NAME, varlen_attention)
