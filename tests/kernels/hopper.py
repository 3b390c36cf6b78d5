"""Compiles the Triton kernels for Hopper (sm_90), where no GPU is needed, and prints what each would take of one.

``python -m tests.kernels.hopper`` prints a JSON object per kernel: ``wgmma`` instructions in the PTX,
``local`` (bytes of local memory per thread: spills, or arrays that found no registers), ``registers`` per thread,
``shared`` memory in bytes per program, of 232,448 that a multiprocessor of an H100 can give (227 KiB).
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from medtrain.benchmarks.tune import BLOCKS
from medtrain.kernels import logps_kernels as kernels
from medtrain.kernels.logps_launch import LAUNCHES, ExpGemm

HOPPER = GPUTarget("cuda", 90, 32)

_FLOATS = ("logits", "offset", "sums", "target_values", "total", "inverse", "target_logits", "maxima", "slots", "acc")
_TENSORS = ("hidden", "weight", "unit", "kept", "out")
_TYPES = dict.fromkeys(_FLOATS, "*fp32") | dict.fromkeys(_TENSORS, "*bf16") | {"targets": "*i64", "rows": "*i32", "count": "*i32"}
# Sizes that change from batch to batch, which the launcher is told not to specialise on.
_VARYING = {"stride_sums", "stride_kept", "num_rows", "num_slots", "num_kept", "low"}
_SECOND = {"BLOCK_N": 128, "UPCAST": False}


def _source(kernel, constants: dict, types: dict | None = None) -> ASTSource:
    """The kernel as the launcher would specialise it: sizes and strides multiples of 16, pointers aligned to 16 bytes."""
    names = [parameter.name for parameter in kernel.params]
    known = _TYPES | (types or {})
    signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in _VARYING and signature[name].startswith(("*", "i32"))
    }
    return ASTSource(kernel, signature, constexprs=constants, attrs=aligned)


def _exp_gemm(b: ExpGemm, flags: dict[str, bool]) -> ASTSource:
    tile = {"BLOCK_M": b.block_m, "BLOCK_N": b.block_n, "BLOCK_K": b.block_k, "GROUP_M": b.group_m, "FLATTEN": b.flatten}
    descriptors = {
        "hidden_desc": f"tensordesc<bf16[{b.block_m}, {b.block_k}]>",
        "weight_desc": f"tensordesc<bf16[{b.block_n}, {b.block_k}]>",
        "out_desc": f"tensordesc<bf16[{b.block_m}, {b.block_n // 2}]>",
    }
    return _source(kernels.exp_gemm_kernel, tile | flags | {"TAIL": True, "UPCAST": False}, descriptors)


def variants() -> Iterator[tuple[str, ASTSource, dict]]:
    """(name, source, compile options) of every kernel in the forms that the CUDA path launches for bfloat16."""
    yield "target_logits", _source(kernels.target_logits_kernel, {"BLOCK_H": 1024}, {"out": "*fp32"}), {}
    yield "unit", _source(kernels.unit_kernel, {"BLOCK_H": 1024}), {}
    yield "list_rows", _source(kernels.list_rows_kernel, {"BLOCK": 4096}), {"num_warps": 8}
    yield "second_walk", _source(kernels.second_walk_kernel, _SECOND), {}
    yield "second_merge", _source(kernels.second_merge_kernel, {}), {}
    yield "second_unit_merge", _source(kernels.second_unit_merge_kernel, {"BLOCK_H": 256}), {}
    # The candidates of the tuner too; how tiles are grouped changes nothing here.
    blocks = dict.fromkeys(replace(one, group_m=8) for one in (*(x.exp_gemm for x in LAUNCHES.values()), *BLOCKS))
    for form, sums, stores, puts in (
        ("reference", True, False, False),
        ("forward", True, True, False),
        ("backward", False, True, True),
    ):
        flags = {"SUM": sums, "STORE": stores, "PUT": puts}
        yield f"exp_rows/{form}", _source(kernels.exp_rows_kernel, {"BLOCK": 4096, **flags}), {"num_warps": 8}
        for b in blocks:
            nested = "" if b.flatten else "-nested"
            name = f"exp_gemm/{form}/{b.block_m}x{b.block_n}x{b.block_k}-{b.num_stages}-{b.num_warps}{nested}"
            yield name, _exp_gemm(b, flags), {"num_warps": b.num_warps, "num_stages": b.num_stages}
    for unit, keep in ((True, True), (True, False), (False, True)):
        flags, name = {"UNIT": unit, "KEEP": keep}, f"second_unit/unit={unit},keep={keep}"
        yield name, _source(kernels.second_unit_kernel, _SECOND | {"BLOCK_H": 256} | flags), {}
        narrow, float32 = _SECOND | {"BLOCK_N": 64, "BLOCK_H": 64} | flags, dict.fromkeys(_TENSORS, "*fp32")
        yield f"{name},float32", _source(kernels.second_unit_kernel, narrow, float32), {"num_warps": 8}


def resources(source: ASTSource, options: dict) -> dict[str, int]:
    """Compile for Hopper and read off what the module docstring lists."""
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    wgmma, local = compiled.asm["ptx"].count("wgmma.mma_async"), found["STACK"] + found["LOCAL"]
    return {"wgmma": wgmma, "local": local, "registers": found["REG"], "shared": compiled.metadata.shared}


if __name__ == "__main__":
    for name, source, options in variants():
        print(json.dumps({"kernel": name, "triton": triton.__version__, **resources(source, options)}), flush=True)
