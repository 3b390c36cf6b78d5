"""The log-probability op on CUDA: GEMMs and Triton kernels over row chunks and vocabulary slabs.

``medtrain.kernels.logps`` states the algebra. E of a slab comes from a float32 GEMM and a pass for the exponential, or
from one fused kernel (``logps_launch``); ``E @ W`` and ``E^T X`` are cuBLAS GEMMs with float32 accumulation. E is
rounded to bfloat16 for 16-bit inputs, the sums are taken before. No call waits for the device: rows out of range are
found, counted and walked again by kernels that end at once when there are none. Two runs agree bit for bit.

On CPU tensors this is the same code under ``TRITON_INTERPRET=1``.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton's types know neither launch options nor plain values for constexpr parameters.)

import contextlib
from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from medtrain.kernels import logps_kernels as kernels
from medtrain.kernels.logps_launch import FLOAT16_ROWS, Launch, choose_launch, slab_size, supports_fused
from medtrain.kernels.logps_torch import OFFSET, Walk, finish, kept_dtype, put_target, slabs, unit_dtype

__all__ = ["grad_weight", "walk"]

# Rows of slabs begin at multiples of so many entries: Triton then knows that 16 bytes can be moved at once.
_ALIGN = 16
_SECOND_M = kernels.SECOND_M.value


def walk(hidden: Tensor, weight: Tensor, targets: Tensor, num_kept: int, needs_unit: bool, requested_slab: int | None) -> Walk:
    """As ``logps_torch.walk``, in float32; ``kept`` is padded to a multiple of 16 columns."""
    num_rows, hidden_size = hidden.shape
    vocab_size = len(weight)
    x, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    launch = choose_launch(hidden_size)
    float32 = {"dtype": torch.float32, "device": x.device}
    e_dtype = kept_dtype(x.dtype)
    with _device(x), _exact_matmul(x.dtype):
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            ((targets >= 0) & (targets < vocab_size)).all(), "chunked_logps: a target lies outside [0, vocabulary size)"
        )
        target_logits = torch.empty(num_rows, **float32)
        total = torch.zeros(num_rows, **float32)
        inverse = torch.empty(num_rows, **float32)
        unit = torch.empty(x.shape if needs_unit else (0,), dtype=unit_dtype(x.dtype), device=x.device)
        kept = torch.empty(num_rows, _ceil(num_kept, _ALIGN), dtype=e_dtype, device=x.device)
        num_clamped = torch.zeros(1, dtype=torch.int64, device=x.device)
        if num_rows:
            kernels.target_logits_kernel[(num_rows,)](x, weight, targets, target_logits, hidden_size, vocab_size, BLOCK_H=1024)
        offset = target_logits + OFFSET

        fused = launch.gemm == "fused" and supports_fused(x, weight)
        bytes_a_logit = (0 if fused else 4) + (e_dtype.itemsize if needs_unit and (fused or e_dtype.itemsize < 4) else 0)
        chunk_rows = min(launch.rows, max(num_rows, 1))
        slab = _ceil(requested_slab or slab_size(vocab_size, chunk_rows, bytes_a_logit, launch.slab_bytes), _ALIGN)
        # Padded to whole tiles of rows: it also serves the rows out of range.
        acc = torch.empty(_ceil(chunk_rows, _SECOND_M) if needs_unit else 0, hidden_size, **float32)
        for start in range(0, num_rows, chunk_rows):
            part = slice(start, min(start + chunk_rows, num_rows))
            rows = Rows(x[part], weight, targets[part], offset[part], launch, fused)
            _walk_chunk(rows, kept[part], num_kept, acc if needs_unit else None, slab, total[part])
            torch.reciprocal(total[part] + torch.exp(target_logits[part] - offset[part]), out=inverse[part])
            if needs_unit:
                kernels.unit_kernel[(len(rows.x), triton.cdiv(hidden_size, 1024))](
                    acc, weight, rows.targets, total[part], inverse[part], unit[part], hidden_size, vocab_size, BLOCK_H=1024
                )
            num_clamped += _walk_again(
                rows, target_logits[part], total[part], inverse[part], kept[part], num_kept, unit[part], acc
            )

        logps, inverse = finish(target_logits, offset, total)
        if num_kept:
            put_target(kept[:, :num_kept], targets, -total)
    return Walk(logps, offset, total, inverse, unit, kept, num_clamped)


class Rows:
    """A chunk of rows, and what makes their E."""

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, offset: Tensor, launch: Launch, fused: bool) -> None:
        self.x, self.weight, self.targets, self.offset = x, weight, targets, offset
        self.launch, self.fused = launch, fused

    def exp_slab(
        self, low: int, high: int, out: Tensor | None, logits: Tensor | None, *, put: Tensor | None = None, sums: bool
    ) -> Tensor | None:
        """E of vocabulary entries low to high into out [n, high - low], unless that is None.

        logits: float32 buffer of at least n x (high - low), for cuBLAS's part. put [n]: what goes to the target's place
        instead of 0. Returns the row sums [parts, n] if ``sums``, in an order of parts that is always the same.
        """
        num_rows, width = len(self.x), high - low
        flags = {"SUM": sums, "STORE": out is not None, "PUT": put is not None}
        out = self.x if out is None else out
        put = self.offset if put is None else put
        if not self.fused:
            logits = _slab_of(logits, num_rows, width)
            _mm(self.x, self.weight[low:high].T, logits)
            parts = torch.empty(1, num_rows, dtype=torch.float32, device=self.x.device) if sums else logits
            kernels.exp_rows_kernel[(num_rows,)](
                logits,
                self.offset,
                self.targets,
                put,
                out,
                parts,
                low,
                width,
                logits.stride(0),
                out.stride(0),
                BLOCK=4096,
                num_warps=8,
                **flags,
            )
            return parts if sums else None
        blocks = self.launch.exp_gemm
        tiles_m, tiles_n = triton.cdiv(num_rows, blocks.block_m), triton.cdiv(width, blocks.block_n)
        parts = torch.empty(tiles_n if sums else 0, num_rows, dtype=torch.float32, device=self.x.device)
        half = [blocks.block_m, blocks.block_n // 2]
        kernels.exp_gemm_kernel[(min(tiles_m * tiles_n, _num_programs(self.x)),)](
            TensorDescriptor.from_tensor(self.x, [blocks.block_m, blocks.block_k]),
            TensorDescriptor.from_tensor(self.weight[low:high], [blocks.block_n, blocks.block_k]),
            TensorDescriptor.from_tensor(out, half),
            self.offset,
            self.targets,
            put,
            parts,
            num_rows,
            low,
            width,
            self.x.shape[1],
            num_rows,
            BLOCK_M=blocks.block_m,
            BLOCK_N=blocks.block_n,
            BLOCK_K=blocks.block_k,
            GROUP_M=blocks.group_m,
            FLATTEN=blocks.flatten,
            TAIL=width % blocks.block_n != 0,
            UPCAST=_upcast(self.x),
            num_stages=blocks.num_stages,
            num_warps=blocks.num_warps,
            **flags,
        )
        return parts if sums else None


def _walk_chunk(rows: Rows, kept: Tensor, num_kept: int, acc: Tensor | None, slab: int, total: Tensor) -> None:
    """total [n] = S; acc [>= n, H] = E @ W if given; kept [n, num_kept] = E of the first entries."""
    num_rows, vocab_size = len(rows.x), len(rows.weight)
    widest = _ceil(min(slab, max(num_kept, vocab_size - num_kept)), _ALIGN)
    logits = buffer = None
    if not rows.fused:
        logits = torch.empty(num_rows * widest, dtype=torch.float32, device=rows.x.device)
    if acc is not None and num_kept < vocab_size:
        # float32 E may take the place of the logits it comes from.
        in_place = logits is not None and kept.dtype == torch.float32
        buffer = logits if in_place else torch.empty(num_rows * widest, dtype=kept.dtype, device=kept.device)
    parts = []
    for low, high in slabs(vocab_size, num_kept, slab):
        if high <= num_kept:
            e = kept[:, low:high]
        else:
            e = None if acc is None else _slab_of(buffer, num_rows, high - low)
        parts.append(rows.exp_slab(low, high, e, logits, sums=True))
        if acc is not None and e is not None:
            # A copy for float16 only, whose E is bfloat16.
            _mm(e, rows.weight[low:high].to(e.dtype), acc[:num_rows], accumulate=low > 0)
    torch.sum(torch.cat(parts), 0, out=total)


def _walk_again(
    rows: Rows, target_logits: Tensor, total: Tensor, inverse: Tensor, kept: Tensor, num_kept: int, unit: Tensor, slots: Tensor
) -> Tensor:
    """Recompute the rows whose sum is out of range with their true maximum, all of their results in place.

    slots [>= n, H] float32 is a buffer. Returns the number of such rows, [1] on the device.
    """
    num_rows, hidden_size = rows.x.shape
    # float32 products go without tensor cores: smaller blocks, or they would spill.
    block_n, widest_h, num_warps = (64, 64, 8) if rows.x.dtype == torch.float32 else (128, 256, 4)
    block_h = min(widest_h, triton.next_power_of_2(max(hidden_size, 16)))
    listed = torch.empty(num_rows, dtype=torch.int32, device=total.device)
    count = torch.empty(1, dtype=torch.int32, device=total.device)
    kernels.list_rows_kernel[(1,)](total, target_logits, listed, count, num_rows, BLOCK=4096, num_warps=8)
    grid = (_num_programs(rows.x),)
    num_slots = triton.cdiv(num_rows, _SECOND_M) + grid[0]
    maxima = torch.empty(2, num_slots, _SECOND_M, dtype=torch.float32, device=total.device)
    options = {"BLOCK_N": block_n, "UPCAST": _upcast(rows.x), "num_warps": num_warps}
    kernels.second_walk_kernel[grid](
        rows.x,
        rows.weight,
        rows.targets,
        listed,
        count,
        maxima[0],
        maxima[1],
        num_slots,
        hidden_size,
        len(rows.weight),
        **options,
    )
    kernels.second_merge_kernel[grid](listed, count, maxima[0], maxima[1], num_slots, target_logits, rows.offset, total, inverse)
    needs_unit = slots.numel() > 0
    if needs_unit or num_kept:
        num_slots = len(slots) // _SECOND_M if needs_unit else num_slots
        kernels.second_unit_kernel[grid](
            rows.x,
            rows.weight,
            rows.targets,
            listed,
            count,
            rows.offset,
            slots,
            kept,
            num_slots,
            hidden_size,
            len(rows.weight),
            num_kept,
            kept.stride(0),
            BLOCK_H=block_h,
            UNIT=needs_unit,
            KEEP=num_kept > 0,
            **options,
        )
    if needs_unit:
        kernels.second_unit_merge_kernel[grid](
            rows.weight,
            rows.targets,
            listed,
            count,
            total,
            inverse,
            slots,
            unit,
            num_slots,
            hidden_size,
            len(rows.weight),
            BLOCK_H=block_h,
        )
    return count


def grad_weight(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    offset: Tensor,
    total: Tensor,
    inverse: Tensor,
    kept: Tensor,
    num_kept: int,
    vocab_size: int,
    requested_slab: int | None,
) -> Tensor:
    """As ``logps_torch.grad_weight``: one GEMM for the kept entries, one a slab for the others, each summed once."""
    num_rows, hidden_size = hidden.shape
    result = torch.empty(vocab_size, hidden_size, dtype=hidden.dtype, device=hidden.device)
    x, targets = hidden.contiguous(), targets.contiguous()
    launch = choose_launch(hidden_size)
    with _device(x), _exact_matmul(x.dtype):
        scaled = torch.mul(x, (inverse * grad).unsqueeze(1), out=torch.empty_like(x, dtype=kept.dtype))
        if num_kept:
            _mm(kept[:, :num_kept].T, scaled, result[:num_kept])
        if num_kept == vocab_size:
            return result
        assert weight is not None, "needed where not all of E is kept"
        weight = weight.contiguous()
        fused = launch.gemm == "fused" and supports_fused(x, weight)
        rest = vocab_size - num_kept
        slab = requested_slab or slab_size(rest, num_rows, kept.dtype.itemsize, launch.grad_slab_bytes)
        slab = _ceil(min(slab, rest), _ALIGN)
        e = torch.empty(num_rows, slab, dtype=kept.dtype, device=x.device)
        chunk_rows = min(launch.rows, num_rows)
        logits = None if fused else torch.empty(chunk_rows * slab, dtype=torch.float32, device=x.device)
        minus_total = -total
        for low, high in slabs(vocab_size, num_kept, slab):
            if high <= num_kept:
                continue
            for start in range(0, num_rows, chunk_rows):
                part = slice(start, min(start + chunk_rows, num_rows))
                rows = Rows(x[part], weight, targets[part], offset[part], launch, fused)
                rows.exp_slab(low, high, e[part, : high - low], logits, put=minus_total[part], sums=False)
            _mm(e[:, : high - low].T, scaled, result[low:high])
    return result


def _mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= a @ b with float32 accumulation: a, b of one dtype, out float32, or of their dtype, or float16."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif not a.is_cuda:  # under the interpreter: float32 results of 16-bit operands exist on CUDA alone
        product = a.float() @ b.float()
        out.copy_(out + product if accumulate else product)
    elif out.dtype == torch.float32:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        assert not accumulate
        for low in range(0, len(a), FLOAT16_ROWS):  # through float32, a part at a time
            part = slice(low, low + FLOAT16_ROWS)
            out[part].copy_(torch.mm(a[part], b, out_dtype=torch.float32))


def _slab_of(buffer: Tensor, num_rows: int, width: int) -> Tensor:
    """[num_rows, width] at the beginning of a flat buffer; rows begin at multiples of _ALIGN elements."""
    return buffer[: num_rows * _ceil(width, _ALIGN)].view(num_rows, -1)[:, :width]


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _upcast(x: Tensor) -> bool:
    return not x.is_cuda


def _num_programs(x: Tensor) -> int:
    """Programs of a persistent kernel: one a multiprocessor; under the interpreter a few, to share work among."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def _device(x: Tensor):
    # Triton launches on the current device, whatever its tensors' is.
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@contextlib.contextmanager
def _exact_matmul(dtype: torch.dtype) -> Iterator[None]:
    """float32 GEMMs in float32, not TF32, and 16-bit ones with float32 sums, whatever the process has set."""
    matmul = torch.backends.cuda.matmul
    if dtype == torch.float32:
        wanted = {} if matmul.fp32_precision == "ieee" else {"fp32_precision": "ieee"}
    else:
        kind = "fp16" if dtype == torch.float16 else "bf16"
        # E is bfloat16 for float16 inputs too.
        wanted = {f"allow_{kind}_reduced_precision_reduction": False, "allow_bf16_reduced_precision_reduction": False}
        wanted |= {"allow_fp16_accumulation": False} if kind == "fp16" else {}
    before = {name: getattr(matmul, name) for name in wanted}
    for name in wanted:
        split_k = getattr(matmul, f"{name}_split_k", None)
        if split_k is not None:  # one setter for both
            before[name] = (before[name], split_k)
    for name, value in wanted.items():
        setattr(matmul, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
