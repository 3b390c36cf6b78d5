"""Compiles the Triton kernels for Hopper (sm_90), where no GPU is needed, and tells what each would take of one.

``python -m medtrain.benchmarks.kernel_resources`` prints one JSON object a kernel: ``wgmma`` instructions in the PTX,
``local`` (bytes of local memory a thread: spills, or arrays that found no registers), ``registers`` a thread,
``shared`` memory in bytes a program, of 232,448 that a multiprocessor of an H100 can give (227 KiB).
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from medtrain.benchmarks.tune import BLOCKS
from medtrain.kernels import logps_kernels as kernels
from medtrain.kernels.logps_launch import LAUNCHES, ExpGemm

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024

_POINTERS = {
    "hidden": "*bf16",
    "weight": "*bf16",
    "targets": "*i64",
    "logits": "*fp32",
    "offset": "*fp32",
    "sums": "*fp32",
    "target_values": "*fp32",
    "total": "*fp32",
    "inverse": "*fp32",
    "target_logits": "*fp32",
    "maxima": "*fp32",
    "slots": "*fp32",
    "acc": "*fp32",
    "rows": "*i32",
    "count": "*i32",
    "unit": "*bf16",
    "kept": "*bf16",
    "out": "*bf16",
}
_FLOAT32 = {name: "*fp32" for name in ("hidden", "weight", "unit", "kept", "out")}
_SECOND = {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64, "UPCAST": False}


def _source(kernel, constants: dict, types: dict | None = None) -> ASTSource:
    """The kernel as the launcher would specialise it: sizes and strides multiples of 16, pointers aligned to 16 bytes."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else ({**_POINTERS, **(types or {})}).get(name, "i32") for name in names}
    # Left out: sizes that change from batch to batch, which the launcher is told not to specialise on.
    varying = {"stride_wh", "stride_sums", "stride_kept", "num_rows", "num_slots", "num_kept", "low"}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in varying and signature[name].startswith(("*", "i32"))
    }
    one = {"stride_wh": 1} if "stride_wh" in names else {}
    signature |= {name: "constexpr" for name in one}
    return ASTSource(kernel, signature, constexprs={**constants, **one}, attrs=aligned)


def _exp_gemm(blocks: ExpGemm, **flags: bool) -> tuple[ASTSource, dict]:
    tile = {
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
        "BLOCK_K": blocks.block_k,
        "GROUP_M": blocks.group_m,
        "FLATTEN": blocks.flatten,
    }
    descriptors = {
        "hidden_desc": f"tensordesc<bf16[{blocks.block_m}, {blocks.block_k}]>",
        "weight_desc": f"tensordesc<bf16[{blocks.block_n}, {blocks.block_k}]>",
        "out_desc": f"tensordesc<bf16[{blocks.block_m}, {blocks.block_n // 2}]>",
    }
    source = _source(kernels.exp_gemm_kernel, {**tile, **flags, "TAIL": True, "UPCAST": False}, descriptors)
    return source, {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}


def variants() -> dict[str, tuple[ASTSource, dict]]:
    """Name -> (source, compile options) of every kernel in the forms that the CUDA path launches for bfloat16."""
    found: dict[str, tuple[ASTSource, dict]] = {
        "target_logits": (_source(kernels.target_logits_kernel, {"BLOCK_H": 1024}, {"out": "*fp32"}), {}),
        "unit": (_source(kernels.unit_kernel, {"BLOCK_H": 1024}), {}),
        "list_rows": (_source(kernels.list_rows_kernel, {"BLOCK": 4096}), {"num_warps": 8}),
        "second_walk": (_source(kernels.second_walk_kernel, _SECOND), {}),
        "second_merge": (_source(kernels.second_merge_kernel, {"BLOCK_M": 16}), {}),
        "second_unit_merge": (_source(kernels.second_unit_merge_kernel, {"BLOCK_M": 16, "BLOCK_H": 256}), {}),
    }
    forms = {
        "reference": {"SUM": True, "STORE": False, "PUT": False},
        "forward": {"SUM": True, "STORE": True, "PUT": False},
        "backward": {"SUM": False, "STORE": True, "PUT": True},
    }
    # The candidates of the tuner too; how tiles are grouped changes nothing here.
    blocks = dict.fromkeys(replace(one, group_m=8) for one in (*(x.exp_gemm for x in LAUNCHES.values()), *BLOCKS))
    for form, flags in forms.items():
        found[f"exp_rows/{form}"] = _source(kernels.exp_rows_kernel, {"BLOCK": 4096, **flags}), {"num_warps": 8}
        for shape in blocks:
            name = f"{shape.block_m}x{shape.block_n}x{shape.block_k}-{shape.num_stages}-{shape.num_warps}"
            name += "" if shape.flatten else "-nested"
            found[f"exp_gemm/{form}/{name}"] = _exp_gemm(shape, **flags)
    for unit, keep in ((True, True), (True, False), (False, True)):
        flags = {"UNIT": unit, "KEEP": keep}
        name = f"second_unit/unit={unit},keep={keep}"
        found[name] = _source(kernels.second_unit_kernel, {**_SECOND, "BLOCK_H": 256, **flags}), {}
        narrow = {**_SECOND, "BLOCK_N": 64, "BLOCK_H": 64, **flags}
        found[f"{name},float32"] = _source(kernels.second_unit_kernel, narrow, _FLOAT32), {"num_warps": 8}
    return found


def resources(source: ASTSource, options: dict) -> dict[str, int]:
    """Compile for Hopper and read off what the module docstring lists."""
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    return {
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "local": stack + local,
        "registers": registers,
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    for name, (source, options) in variants().items():
        print(json.dumps({"kernel": name, "triton": triton.__version__, **resources(source, options)}), flush=True)
    print(json.dumps({"launches": {size: asdict(launch) for size, launch in LAUNCHES.items()}}))


if __name__ == "__main__":
    main()
