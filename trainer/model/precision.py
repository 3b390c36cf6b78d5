"""Which linear layers compute in FP8, decided from the model's shapes and the device before anything is built.

FP8 itself is in medtrain.trainer.model.fp8, which needs torchao; this file does not, so that settings are checked without it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from medtrain.trainer.config.settings import PrecisionConfig
from medtrain.trainer.errors import bad_input
from medtrain.trainer.model.names import layer_kind, linear_shapes

MOMENT_BLOCK = 128  # 8-bit moments that share a scale; torchao's own 256 does not divide the rows of many models (896, 29568)
MULTIPLE = 16  # of both dims of a weight: what torch._scaled_mm asks for
LEAST_CAPABILITY = (8, 9)  # of a CUDA device with FP8 matrix products


@dataclass(frozen=True)
class Fp8:
    """What computes in FP8: ``names`` are weights (``model.layers.0.mlp.up_proj.weight``), ``others`` counts the model's
    other matrices by the reason why they do not."""

    recipe: str  # tensorwise | rowwise
    all_gather: bool
    emulate: bool
    names: frozenset[str]
    others: dict[str, int]

    def describe(self) -> str:
        """One line for the user."""
        gather = ", gathered in FP8" if self.all_gather else ""
        emulated = ", emulated" if self.emulate else ""
        others = ", ".join(f"{count} {reason}" for reason, count in self.others.items())
        return f"FP8 {self.recipe}{gather}{emulated}: {len(self.names)} matrices; not in FP8: {others}"

    def about(self) -> dict[str, Any]:
        """What the manifest says of it: the kinds of layers with how many of each, and what is left out and why."""
        return {
            "recipe": self.recipe,
            "all_gather": self.all_gather,
            "emulated": self.emulate,
            "matrices": dict(sorted(Counter(map(layer_kind, self.names)).items())),
            "not_in_fp8": self.others,
        }


def plan_fp8(
    config: PrecisionConfig, shapes: dict[str, tuple[int, ...]], device: torch.device, compute_dtype: torch.dtype
) -> Fp8 | None:
    """What ``precision`` asks for on a model of these parameter shapes and this device; None where it is off.

    Head and embedding never compute in FP8, nor do weights with a dim that is no multiple of 16.

    Raises InputError: a device without FP8 without emulation, no layer that could compute in FP8.
    """
    if config.fp8 == "none":
        return None
    if not config.fp8_emulate:
        _check_device(device, compute_dtype)
    linears = linear_shapes(shapes)
    names = frozenset(name for name, shape in linears.items() if not any(n % MULTIPLE for n in shape))
    others = {"embedding or head": sum(len(shape) == 2 for shape in shapes.values()) - len(linears)}
    if odd := len(linears) - len(names):
        others[f"with a dim that is no multiple of {MULTIPLE}"] = odd
    if not names:
        found = ", ".join(sorted({"x".join(map(str, shape)) for shape in linears.values()}))
        expected = f"dims that are multiples of {MULTIPLE}"
        raise bad_input("no layer can compute in FP8", field="precision.fp8", found=found, expected=expected)
    load_torchao("precision.fp8")
    return Fp8(config.fp8, config.fp8_all_gather, config.fp8_emulate, names, others)


def _check_device(device: torch.device, compute_dtype: torch.dtype) -> None:
    found = device.type
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)}, {'.'.join(map(str, capability))}"
    if device.type != "cuda" or capability < LEAST_CAPABILITY:
        expected = "a CUDA device of compute capability 8.9 or above, or precision.fp8_emulate=true (slow)"
        raise bad_input("this device has no FP8", field="precision.fp8", found=found, expected=expected)
    if compute_dtype != torch.bfloat16:
        problem = "FP8 products are rounded to bfloat16"
        raise bad_input(problem, field="precision.compute", found=str(compute_dtype), expected="bfloat16")


def load_torchao(setting: str) -> None:
    """Import torchao, without its warnings about kernels that a machine without CUDA cannot load.

    Raises InputError: it is not installed, or not in a version that is known to work; names ``setting``, which needs it.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    expected = "pip install 'torchao>=0.17,<0.19'"
    try:
        logging.disable(logging.WARNING)
        import torchao.float8
        import torchao.optim.quant_utils  # noqa: F401

        version = importlib.metadata.version("torchao")
    except ImportError:
        raise bad_input("torchao is not installed", field=setting, expected=expected) from None
    finally:
        logging.disable(logging.NOTSET)
    if not version.startswith(("0.17.", "0.18.")):
        raise bad_input("another torchao", field=setting, found=version, expected=expected)
