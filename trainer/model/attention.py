"""Causal attention over packed documents by three backends; documents never see each other.

The model is called on one flat row of tokens [1, T], cut into segments. A segment's tokens attend causally to each other, and
to a shared prompt elsewhere in the row, if it has one:

- ``flash_attn`` (the package) and ``torch_varlen``, on CUDA in half precision: keys and values of (prompt, segment) are
  gathered, the queries stay. Both kernels align their causal mask to the bottom right (flash-attn by its documentation; torch
  by ``row_idx + max_seqlen_k - max_seqlen_q`` in ATen's flash_attn/mask.h).
- ``sdpa``, on any device: (prompt, segment) of like length as padded rows of plain causal attention; the prompt's queries are
  computed again and dropped. In compiled layers, where other groups would be another graph, one mask over all tokens.

A gathered prompt's gradients are added in a fixed order on the CPU and under ``torch.use_deterministic_algorithms``, else by
atomics, where the sum of more than two may differ in its last bit.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from medtrain.trainer.data.batch import MicroBatch

_KNOWS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
NAME = "medtrain_varlen"  # the attn_implementation of every model that medtrain builds


def select_backend(device: torch.device, dtype: torch.dtype, compiled: bool = False) -> str:
    """The backend for this device and compute dtype: ``flash_attn``, ``torch_varlen`` or ``sdpa``. In compiled layers torch's
    own comes first: the compiler knows its shapes and its gradient."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        has_varlen = torch.cuda.get_device_capability(device) >= (8, 0)
        if compiled and has_varlen:
            return "torch_varlen"
        with contextlib.suppress(ImportError, AttributeError):  # other packages share the name; only the function counts
            from flash_attn import flash_attn_varlen_func  # noqa: F401  # pyright: ignore[reportMissingImports] (optional)

            return "flash_attn"
        if has_varlen:
            return "torch_varlen"
    return "sdpa"


@dataclass(frozen=True)
class PackedLayout:
    """Where the segments of one packed row lie, prepared once per micro-batch and used by every layer.

    ``cu_seqlens``, ``key_cu_seqlens``, ``key_index`` and the two maxima: as in the micro-batch.
    ``groups``, for ``sdpa``: per group of segments of like key length, int64 [segments, length]: the token at each place, a
    segment's last token standing in for padding.
    ``inverse``, for ``sdpa``: [T], the place of each token in the groups laid end to end.
    """

    backend: str
    cu_seqlens: torch.Tensor
    max_seqlen: int
    key_cu_seqlens: torch.Tensor
    max_key_seqlen: int
    key_index: torch.Tensor | None = None
    groups: tuple[torch.Tensor, ...] = ()
    inverse: torch.Tensor | None = None

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        return self.cu_seqlens, self.key_cu_seqlens, self.max_seqlen, self.max_key_seqlen


def packed_layout(batch: MicroBatch, backend: str) -> PackedLayout:
    """The layout of the packed row of ``batch``, on its device."""
    keys = (batch.key_cu_seqlens, batch.max_key_seqlen, batch.key_index)
    if backend != "sdpa":
        return PackedLayout(backend, batch.cu_seqlens, batch.max_seqlen, *keys)
    device = batch.cu_seqlens.device
    own = batch.cu_seqlens.cpu().long().diff()  # planned on the host, wherever the batch is
    bounds = batch.key_cu_seqlens.cpu().long()
    tokens = torch.arange(int(bounds[-1])) if batch.key_index is None else batch.key_index.cpu()
    starts, lengths = bounds[:-1], bounds.diff()
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    groups, inverse, placed, first = [], torch.empty(int(own.sum()), dtype=torch.long), 0, 0
    while first < len(sorted_lengths):
        longest = sorted_lengths[first]
        # A new group costs some kernel launches, padding costs work: allow a quarter, or a few tokens.
        shortest = longest - max(8, longest // 4)
        last = first
        while last < len(sorted_lengths) and sorted_lengths[last] >= shortest:
            last += 1
        segments = order[first:last]
        column, length = torch.arange(longest), lengths[segments, None]
        wanted = (column < length) & (column >= length - own[segments, None])
        index = tokens[starts[segments, None] + torch.minimum(column, length - 1)]
        place = placed + torch.arange(index.numel()).view_as(index)
        inverse[index[wanted]] = place[wanted]
        groups.append(index.to(device))
        placed += index.numel()
        first = last
    return PackedLayout(backend, batch.cu_seqlens, batch.max_seqlen, *keys, tuple(groups), inverse.to(device))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scale: float) -> torch.Tensor:
    """q [T, heads, dim], k and v [T, kv_heads, dim] -> [T, heads, dim]."""
    if len(layout.groups) == 1 and len(layout.groups[0]) == 1:  # one segment: nothing to gather
        return _attend(q, k, v, scale, is_causal=True)
    assert layout.inverse is not None
    pieces = [_attend(q, k, v, scale, index, is_causal=True) for index in layout.groups]
    return torch.cat(pieces).index_select(0, layout.inverse)


def _masked_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scale: float) -> torch.Tensor:
    """As _sdpa, with tensors of T x K booleans and scores instead of a Python loop over groups."""
    k, v = _gather(k, v, layout)
    bounds, key_bounds = layout.cu_seqlens, layout.key_cu_seqlens
    token, key = torch.arange(q.shape[0], device=q.device), torch.arange(k.shape[0], device=q.device)
    segment = torch.bucketize(token, bounds[1:], right=True)
    first = key_bounds[segment]
    own = token - bounds[segment + 1] + key_bounds[segment + 1]  # a token's own key: segments end together
    mask = (key >= first.unsqueeze(1)) & (key <= own.unsqueeze(1))
    return _attend(q, k, v, scale, attn_mask=mask)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, index: torch.Tensor | None = None, **mask: Any
) -> torch.Tensor:
    """Attention among the tokens of each row of ``index`` [rows, length], by default of all, one row after the other."""
    if index is not None:
        q, k, v = (t.index_select(0, index.view(-1)) for t in (q, k, v))
    shape, grouped, rows = q.shape, k.shape[1] != q.shape[1], 1 if index is None else len(index)
    q, k, v = (t.view(rows, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, **mask).transpose(1, 2).reshape(shape)


def _gather(k: torch.Tensor, v: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    if layout.key_index is None:
        return k, v
    return k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)


def _torch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scale: float) -> torch.Tensor:
    k, v = _gather(k, v, layout)
    options: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if _KNOWS_GROUPS:
            options["enable_gqa"] = True
        else:  # torch 2.11
            repeat = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    # window_size=(-1, 0) is how this function spells causal; without return_aux its result is one tensor.
    return cast(torch.Tensor, varlen_attn(q, k, v, *layout.bounds, scale=scale, window_size=(-1, 0), **options))


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PackedLayout, scale: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports] (optional)

    k, v = _gather(k, v, layout)
    # Its backward adds up in any order unless it is deterministic.
    options = {"softmax_scale": scale, "causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    return flash_attn_varlen_func(q, k, v, *layout.bounds, **options)


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
    position_ids: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention: query [1, heads, T, dim] -> ([1, T, heads, dim], None).

    ``position_ids`` and ``use_cache`` change nothing here: rotary embedding is done, and no cache is kept. A missing layout
    or anything else (a mask, dropout, a window, sinks) would silently be another computation, so each is refused.
    """
    unknown = [name for name, value in others.items() if value is not None]
    if layout is None or attention_mask is not None or dropout or unknown:
        raise ValueError(f"packed attention takes a layout and no mask, dropout or others {unknown}")
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    attend = _BACKENDS[layout.backend]
    if attend is _sdpa and torch.compiler.is_compiling():
        attend = _masked_sdpa
    return attend(q, k, v, layout, scaling).unsqueeze(0), None


AttentionInterface.register(NAME, varlen_attention)
