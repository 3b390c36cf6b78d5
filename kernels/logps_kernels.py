"""Triton kernels of the log-probability op: what runs on the device. ``logps_triton`` launches them.

Common to all: ``hidden`` and ``weight`` are contiguous; offsets into tensors are 64-bit; every element is written by one
program in a fixed order, so two runs agree bit for bit. ``UPCAST`` multiplies 16-bit operands as float32: Triton's
interpreter needs it, no device does.

The kernels named ``second`` walk the rows that were out of range a second time. Which rows those are only the device
knows, and the host does not wait to learn it: they read the count themselves and end at once when it is 0.
"""

# pyright: reportGeneralTypeIssues=false
# (Triton types a jitted function as one that never returns.)

import triton
import triton.language as tl

__all__ = ["exp_gemm_kernel", "exp_rows_kernel", "target_logits_kernel", "unit_kernel"]
__all__ += ["list_rows_kernel", "second_walk_kernel", "second_merge_kernel", "second_unit_kernel", "second_unit_merge_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)
# e is clamped at 2**108: finite in float32 and bfloat16, and the sum of the row then says that it is out of range.
SUM_LIMIT_LOG2 = tl.constexpr(108.0)
SUM_LIMIT = tl.constexpr(2.0**108)
# Blocks of the second walk: tl.dot needs at least 16 rows.
SECOND_M = tl.constexpr(16)
SECOND_K = tl.constexpr(64)


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    # "ieee": float32 operands are not to be rounded to TF32; 16-bit ones do not care.
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def target_logits_kernel(hidden, weight, targets, out, hidden_size, vocab_size, BLOCK_H: tl.constexpr):
    """out [N] = hidden [N, H] . weight[targets]; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    # A target outside [0, V) fails an assertion of its own; here it must only not read foreign memory.
    target = tl.minimum(tl.maximum(tl.load(targets + row), 0), vocab_size - 1)
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H).to(tl.int64)
        mask = h < hidden_size
        x = tl.load(hidden + row * hidden_size + h, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + target * hidden_size + h, mask=mask, other=0.0).to(tl.float32)
        total += x * w
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def _exp(logits, offset):
    return tl.exp2(tl.minimum((logits - offset) * LOG2E, SUM_LIMIT_LOG2))


# Sizes that differ from batch to batch: not to be compiled for each kind of number.
@triton.jit(do_not_specialize=["low"])
def exp_rows_kernel(
    logits,
    offset,
    targets,
    target_values,
    out,
    sums,
    low,
    width,
    stride_logits,
    stride_out,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
    STORE: tl.constexpr,
    PUT: tl.constexpr,
):
    """E of one slab from its logits [n, width] (vocabulary entries low to low + width); one program a row.

    SUM: sums [n] = row sums of E, in float32 before any rounding. STORE: out [n, width] = E, in out's dtype, and with PUT
    target_values [n] in the target's place. ``out`` may be ``logits``.
    """
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(offset + row)
    target = tl.load(targets + row) - low
    if PUT:
        value = tl.load(target_values + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < width
        z = tl.load(logits + row * stride_logits + column, mask=mask, other=-float("inf"))
        e = tl.where(column == target, 0.0, _exp(z, m))
        total += e
        if STORE:
            if PUT:
                e = tl.where(column == target, value, e)
            tl.store(out + row * stride_out + column, e.to(out.dtype.element_ty), mask=mask)
    if SUM:
        tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def _exp_half(acc, m, target, value, width, HALF: tl.constexpr, TAIL: tl.constexpr, SUM: tl.constexpr, PUT: tl.constexpr):
    """(E of one half of a tile, with the value to store in the target's place; its row sums). ``target`` and ``width``
    are relative to the half, in 32 bits: the epilogue has little time between two tiles."""
    column = tl.arange(0, HALF)
    is_target = column[None, :] == target[:, None]
    e = tl.where(is_target, 0.0, _exp(acc, m[:, None]))
    if TAIL:  # entries beyond the vocabulary were loaded as zeros: their logit of 0 must not count
        e = tl.where((column < width)[None, :], e, 0.0)
    sums = tl.sum(e, 1)
    if PUT:
        e = tl.where(is_target, value[:, None], e)
    return e, sums


@triton.jit(do_not_specialize=["num_rows", "low", "stride_sums"])
def exp_gemm_kernel(
    hidden_desc,
    weight_desc,
    out_desc,
    offset,
    targets,
    target_values,
    sums,
    num_rows,
    low,
    width,
    hidden_size,
    stride_sums,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    TAIL: tl.constexpr,
    SUM: tl.constexpr,
    STORE: tl.constexpr,
    PUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """E of one slab straight from hidden [n, H] and weight [width, H]: a persistent GEMM with the exponential behind it.

    Operands and result go through tensor descriptors (Hopper's copy engine). SUM: sums [tiles of width, n], one row sum a
    tile, to be added up in the order of the tiles. TAIL: the last tile is not full. STORE and PUT as in
    ``exp_rows_kernel``; out_desc's blocks are half a tile wide, so that the epilogue needs half the registers and shared
    memory.
    """
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    tiles_k = tl.cdiv(hidden_size, BLOCK_K)
    # Tiles in groups of GROUP_M rows share their weights in the L2 cache.
    tiles_in_group = GROUP_M * tiles_n
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        first_m = tile // tiles_in_group * GROUP_M
        group_m = tl.minimum(tiles_m - first_m, GROUP_M)
        tile_m = first_m + tile % tiles_in_group % group_m
        tile_n = tile % tiles_in_group // group_m
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(tiles_k):
            x = hidden_desc.load([tile_m * BLOCK_M, k * BLOCK_K])
            w = weight_desc.load([tile_n * BLOCK_N, k * BLOCK_K])
            acc = _dot(x, w.T, acc, UPCAST)

        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < num_rows
        m = tl.load(offset + rows, mask=row_mask, other=0.0)
        start = tile_n * BLOCK_N
        target = (tl.load(targets + rows, mask=row_mask, other=-1) - low - start).to(tl.int32)
        value = m
        if PUT:
            value = tl.load(target_values + rows, mask=row_mask, other=0.0)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        e, sum_left = _exp_half(left, m, target, value, width - start, HALF, TAIL, SUM, PUT)
        if STORE:
            out_desc.store([tile_m * BLOCK_M, start], e.to(out_desc.dtype))
        e, sum_right = _exp_half(right, m, target - HALF, value, width - start - HALF, HALF, TAIL, SUM, PUT)
        if STORE:
            out_desc.store([tile_m * BLOCK_M, start + HALF], e.to(out_desc.dtype))
        if SUM:
            tl.store(sums + tile_n * stride_sums + rows, sum_left + sum_right, mask=row_mask)


@triton.jit
def unit_kernel(acc, weight, targets, total, inverse, unit, hidden_size, vocab_size, BLOCK_H: tl.constexpr):
    """unit [n, H] = v (acc - S weight[targets]), acc being E @ W in float32; a program a row and block of H."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.minimum(tl.maximum(tl.load(targets + row), 0), vocab_size - 1)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
    mask = h < hidden_size
    a = tl.load(acc + row * hidden_size + h, mask=mask)
    w = tl.load(weight + target * hidden_size + h, mask=mask).to(tl.float32)
    result = tl.load(inverse + row) * (a - tl.load(total + row) * w)
    tl.store(unit + row * hidden_size + h, result.to(unit.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def list_rows_kernel(total, target_logits, rows, count, num_rows, BLOCK: tl.constexpr):
    """Lists the rows whose sum is out of range, in order: rows [n] int32, and their number, count [1] int32.

    A row whose target logit is NaN is not listed: all of its results are NaN already, and in a broken model, where every
    row is so, a second walk would look like a hang.
    """
    found = 0
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        s = tl.load(total + row, mask=row < num_rows, other=0.0)
        # Written so that NaN counts as out of range too.
        z = tl.load(target_logits + row, mask=row < num_rows, other=0.0)
        outside = tl.where((s < SUM_LIMIT) | (z != z), 0, 1)
        tl.store(rows + found + tl.cumsum(outside, 0) - outside, row, mask=outside == 1)
        found += tl.sum(outside, 0)
    tl.store(count, found)


@triton.jit
def _second_split(count, num_slots):
    """(tiles of rows, parts that each tile's vocabulary is cut into): as many parts as fit the slots and programs."""
    num_tiles = tl.cdiv(count, SECOND_M)
    return num_tiles, tl.maximum(1, tl.minimum(tl.num_programs(0), num_slots // tl.maximum(num_tiles, 1)))


@triton.jit
def _second_rows(rows, count, tile):
    """(rows of one tile [SECOND_M] int64, their mask)."""
    place = tile * SECOND_M + tl.arange(0, SECOND_M)
    return tl.load(rows + place, mask=place < count, other=0).to(tl.int64), place < count


@triton.jit
def _second_logits(hidden, weight, row, column, target, hidden_size, vocab_size, UPCAST: tl.constexpr):
    """Logits of rows x entries, -inf at the target and beyond the vocabulary."""
    z = tl.zeros([SECOND_M, column.shape[0]], tl.float32)
    in_vocab = column < vocab_size
    for k in range(0, hidden_size, SECOND_K):
        h = k + tl.arange(0, SECOND_K).to(tl.int64)
        h_mask = h < hidden_size
        x = tl.load(hidden + row[:, None] * hidden_size + h[None, :], mask=h_mask[None, :], other=0.0)
        w = tl.load(weight + column[None, :] * hidden_size + h[:, None], mask=h_mask[:, None] & in_vocab[None, :], other=0.0)
        z = _dot(x, w, z, UPCAST)
    return tl.where(in_vocab[None, :] & (column[None, :] != target[:, None]), z, -float("inf"))


@triton.jit(do_not_specialize=["num_slots"])
def second_walk_kernel(
    hidden,
    weight,
    targets,
    rows,
    count,
    maxima,
    sums,
    num_slots,
    hidden_size,
    vocab_size,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """True maximum and sum of the listed rows, a part of the vocabulary a slot: maxima, sums [num_slots, SECOND_M]."""
    num_listed = tl.load(count)
    num_tiles, num_parts = _second_split(num_listed, num_slots)
    vocab_tiles = tl.cdiv(vocab_size, BLOCK_N)
    tiles_a_part = tl.cdiv(vocab_tiles, num_parts)
    for slot in range(tl.program_id(0), num_tiles * num_parts, tl.num_programs(0)):
        row, _ = _second_rows(rows, num_listed, slot // num_parts)
        target = tl.load(targets + row)
        first = slot % num_parts * tiles_a_part
        m = tl.full([SECOND_M], -float("inf"), tl.float32)
        s = tl.zeros([SECOND_M], tl.float32)
        for tile in range(first, tl.minimum(first + tiles_a_part, vocab_tiles)):
            column = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            z = _second_logits(hidden, weight, row, column, target, hidden_size, vocab_size, UPCAST)
            new = tl.maximum(m, tl.max(z, 1))
            finite = tl.where(new == -float("inf"), 0.0, new)
            s = s * tl.exp2((m - finite) * LOG2E) + tl.sum(tl.exp2((z - finite[:, None]) * LOG2E), 1)
            m = new
        place = slot * SECOND_M + tl.arange(0, SECOND_M).to(tl.int64)
        tl.store(maxima + place, m)
        tl.store(sums + place, s)


@triton.jit(do_not_specialize=["num_slots"])
def second_merge_kernel(rows, count, maxima, sums, num_slots, target_logits, offset, total, inverse):
    """Writes m, S and v of the listed rows from the parts' maxima and sums. As many programs as in second_walk_kernel."""
    num_listed = tl.load(count)
    num_tiles, num_parts = _second_split(num_listed, num_slots)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row, mask = _second_rows(rows, num_listed, tile)
        m = tl.full([SECOND_M], -float("inf"), tl.float32)
        s = tl.zeros([SECOND_M], tl.float32)
        for part in range(num_parts):
            place = (tile * num_parts + part) * SECOND_M + tl.arange(0, SECOND_M).to(tl.int64)
            part_m = tl.load(maxima + place)
            new = tl.maximum(m, part_m)
            finite = tl.where(new == -float("inf"), 0.0, new)
            s = s * tl.exp2((m - finite) * LOG2E) + tl.load(sums + place) * tl.exp2((part_m - finite) * LOG2E)
            m = new
        z = tl.load(target_logits + row, mask=mask, other=0.0)
        tl.store(offset + row, m, mask=mask)
        tl.store(total + row, s, mask=mask)
        tl.store(inverse + row, 1.0 / (s + tl.exp2((z - m) * LOG2E)), mask=mask)


@triton.jit(do_not_specialize=["num_slots", "num_kept", "stride_kept"])
def second_unit_kernel(
    hidden,
    weight,
    targets,
    rows,
    count,
    offset,
    slots,
    kept,
    num_slots,
    hidden_size,
    vocab_size,
    num_kept,
    stride_kept,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNIT: tl.constexpr,
    KEEP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """E of the listed rows by their true m. UNIT: slots [num_slots, SECOND_M, H] = E @ W over a part of the vocabulary.
    KEEP: kept [n, num_kept] = E."""
    num_listed = tl.load(count)
    num_tiles, num_parts = _second_split(num_listed, num_slots)
    vocab_tiles = tl.cdiv(vocab_size, BLOCK_N)
    tiles_a_part = tl.cdiv(vocab_tiles, num_parts)
    blocks_h = 1
    if UNIT:
        blocks_h = tl.cdiv(hidden_size, BLOCK_H)
    for item in range(tl.program_id(0), num_tiles * num_parts * blocks_h, tl.num_programs(0)):
        slot = item // blocks_h
        block_h = item % blocks_h
        row, mask = _second_rows(rows, num_listed, slot // num_parts)
        target = tl.load(targets + row)
        m = tl.load(offset + row)
        h = block_h * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
        acc = tl.zeros([SECOND_M, BLOCK_H], tl.float32)
        first = slot % num_parts * tiles_a_part
        for tile in range(first, tl.minimum(first + tiles_a_part, vocab_tiles)):
            column = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            z = _second_logits(hidden, weight, row, column, target, hidden_size, vocab_size, UPCAST)
            e = tl.exp2((z - m[:, None]) * LOG2E).to(kept.dtype.element_ty)
            if KEEP:
                tl.store(
                    kept + row[:, None] * stride_kept + column[None, :],
                    e,
                    mask=mask[:, None] & (column < num_kept)[None, :] & (block_h == 0),
                )
            if UNIT:
                w = tl.load(
                    weight + column[:, None] * hidden_size + h[None, :],
                    mask=(column < vocab_size)[:, None] & (h < hidden_size)[None, :],
                    other=0.0,
                )
                acc = _dot(e, w.to(kept.dtype.element_ty), acc, UPCAST)
        if UNIT:
            place = slot * SECOND_M + tl.arange(0, SECOND_M).to(tl.int64)
            tl.store(slots + place[:, None] * hidden_size + h[None, :], acc, mask=(h < hidden_size)[None, :])


@triton.jit(do_not_specialize=["num_slots"])
def second_unit_merge_kernel(
    weight, targets, rows, count, total, inverse, slots, unit, num_slots, hidden_size, vocab_size, BLOCK_H: tl.constexpr
):
    """Writes the unit gradient of the listed rows from the parts. As many programs as in second_unit_kernel."""
    num_listed = tl.load(count)
    num_tiles, num_parts = _second_split(num_listed, num_slots)
    blocks_h = tl.cdiv(hidden_size, BLOCK_H)
    for item in range(tl.program_id(0), num_tiles * blocks_h, tl.num_programs(0)):
        tile = item // blocks_h
        row, mask = _second_rows(rows, num_listed, tile)
        h = item % blocks_h * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
        h_mask = (h < hidden_size)[None, :]
        acc = tl.zeros([SECOND_M, BLOCK_H], tl.float32)
        for part in range(num_parts):
            place = (tile * num_parts + part) * SECOND_M + tl.arange(0, SECOND_M).to(tl.int64)
            acc += tl.load(slots + place[:, None] * hidden_size + h[None, :], mask=h_mask, other=0.0)
        target = tl.minimum(tl.maximum(tl.load(targets + row), 0), vocab_size - 1)
        w = tl.load(weight + target[:, None] * hidden_size + h[None, :], mask=h_mask, other=0.0)
        s, v = tl.load(total + row), tl.load(inverse + row)
        result = v[:, None] * (acc - s[:, None] * w.to(tl.float32))
        tl.store(unit + row[:, None] * hidden_size + h[None, :], result.to(unit.dtype.element_ty), mask=mask[:, None] & h_mask)
