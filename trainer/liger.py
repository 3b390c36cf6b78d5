"""Liger's Triton kernels for norms, rotary embedding and SwiGLU, put into a decoder's own modules.

Only ``forward`` functions are replaced, module by module: parameters, names, and every other model of the process stay as
they are. Rotary embedding is a function that each attention's ``forward`` finds among its module's globals; the replaced
forward is the same code with another one there.
"""

from __future__ import annotations

import functools
import importlib.util
import types

import torch
import torch.nn as nn
from transformers import PreTrainedConfig

from medtrain.trainer.config import ModelConfig
from medtrain.trainer.errors import bad_input

ROTARY = "apply_rotary_pos_emb"


def select_layers(config: ModelConfig, hf_config: PreTrainedConfig, device: torch.device) -> str:
    """Whose layers these settings take on this device: ``torch``, ``liger`` or ``compiled``.

    Raises:
        InputError: Liger asked for where it cannot be.
    """
    if config.compile:
        return "compiled"
    if config.kernels == "torch":
        return "torch"
    missing = None
    if device.type != "cuda":
        missing = f"{device.type}: its kernels are for CUDA"
    elif importlib.util.find_spec("liger_kernel") is None:
        missing = "not installed: pip install 'liger-kernel>=0.8.5,<0.9'"
    elif hf_config.hidden_act not in ("silu", "swish"):
        missing = f"hidden_act {hf_config.hidden_act}: its kernel is for silu"
    if missing is None:
        return "liger"
    if config.kernels == "liger":
        raise bad_input(
            "Liger's kernels cannot be used", field="model.kernels", found=missing, expected="auto or torch"
        )
    return "torch"


def use_liger(model: nn.Module) -> None:
    """Replace the forwards of a decoder's norms, MLPs and rotary embedding (Qwen2, Qwen3, Llama, Mistral)."""
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    def norm(module, hidden_states):
        # Not in place: autograd does not promise that nobody else holds the gradient that comes in.
        return LigerRMSNormFunction.apply(hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", False)

    def mlp(module, x):
        return module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x)))

    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = functools.partial(norm, module)
        elif name.endswith("MLP"):
            module.forward = functools.partial(mlp, module)
        elif name.endswith("Attention"):
            forward = type(module).forward
            if ROTARY not in forward.__code__.co_names:
                raise ValueError(f"{name}.forward has no {ROTARY}: another version of transformers?")
            scope = {**forward.__globals__, ROTARY: LigerRopeFunction.apply}
            again = types.FunctionType(
                forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__
            )
            again.__kwdefaults__ = forward.__kwdefaults__
            module.forward = types.MethodType(again, module)
