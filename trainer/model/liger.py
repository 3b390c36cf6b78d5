"""Liger's Triton kernels for norms, rotary embedding and SwiGLU in one decoder, by its ``apply_liger_kernel_to_MODEL_TYPE``.

Liger also patches the classes and the rotary function of transformers' modeling module. Other models of the process, such as the
one that verifies the weights, must stay as they are: the module gets its names back at once, and has Liger's rotary function
only while an attention of this decoder runs.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig

from medtrain.trainer.config.settings import ModelConfig
from medtrain.trainer.errors import bad_input

log = logging.getLogger(__name__)

ROTARY = "apply_rotary_pos_emb"


def select_layers(config: ModelConfig, hf_config: PreTrainedConfig, device: torch.device) -> str:
    """Whose layers these settings take on this device: ``torch``, ``liger`` or ``compiled``. Where ``auto`` would take
    Liger's on this device and cannot, the reason is logged.

    Raises InputError: Liger required where it cannot be used; layers compiled in a way that this torch cannot.
    """
    if config.compile and config.activation_checkpointing == "selective" and torch.__version__ < "2.13":
        raise bad_input(
            "compiled with this torch, it makes new graphs for new lengths until the compiler gives up",
            field="model.activation_checkpointing",
            found=f"selective, torch {torch.__version__}",
            expected="full or budget with model.compile, or torch 2.13",
        )
    if config.compile:
        return "compiled"
    if config.kernels == "torch" or (config.kernels == "auto" and device.type != "cuda"):
        return "torch"
    obstacle = _obstacle(hf_config, device)
    if obstacle is None:
        return "liger"
    if config.kernels == "liger":
        raise bad_input("Liger's kernels cannot be used", field="model.kernels", found=obstacle, expected="auto or torch")
    log.info(f"note: model.kernels=auto takes torch's layers, not Liger's: {obstacle}")
    return "torch"


def _obstacle(hf_config: PreTrainedConfig, device: torch.device) -> str | None:
    """Why Liger's kernels cannot be used; None where they can: they are put into such a decoder, on meta, to see."""
    if device.type != "cuda":
        return f"{device.type}: its kernels are for CUDA"
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed: pip install 'liger-kernel>=0.8.5,<0.9'"
    if hf_config.hidden_act not in ("silu", "swish"):
        return f"hidden_act {hf_config.hidden_act}: its kernel is for silu"
    try:
        with torch.device("meta"):
            use_liger(AutoModel.from_config(hf_config))
    except Exception as error:  # another version of Liger or transformers: whatever it is, torch's layers are there
        return f"{type(error).__name__}: {error}"
    return None


def use_liger(decoder: Any) -> None:
    """Let Liger replace the forwards of a decoder's norms, MLPs and rotary embedding; parameters and names stay.

    Raises whatever Liger does where it has nothing for this model type, or no longer patches what this relies on.
    """
    import liger_kernel.transformers

    apply = getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{decoder.config.model_type}")
    modeling = sys.modules[type(decoder).__module__]  # before it is sharded: FSDP changes the class
    before = dict(vars(modeling))
    try:
        apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=decoder)
        rotary = getattr(modeling, ROTARY)
    finally:
        vars(modeling).update(before)
    if rotary is before.get(ROTARY):
        raise RuntimeError(f"Liger left {modeling.__name__}.{ROTARY} as it was")
    for layer in decoder.layers:
        layer.self_attn.forward = functools.partial(_with_rotary, modeling, rotary, layer.self_attn.forward)


def _with_rotary(modeling: ModuleType, rotary: Callable, forward: Callable, *args, **kwargs):
    before = getattr(modeling, ROTARY)
    setattr(modeling, ROTARY, rotary)
    try:
        return forward(*args, **kwargs)
    finally:
        setattr(modeling, ROTARY, before)
