"""The policy: a Hugging Face decoder whose head gives log-probabilities, built on meta and sharded by FSDP2.

The order matters: build on the meta device, put in adapters, wrap for activation checkpointing, compile, shard, ``to_empty``,
rebuild the rotary tables (which ``to_empty`` leaves as garbage), then fill in the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedConfig

from medtrain.kernels.head import LogpsHead
from medtrain.trainer.config.settings import ModelConfig, ParallelConfig
from medtrain.trainer.data.batch import MicroBatch
from medtrain.trainer.distributed import World
from medtrain.trainer.model import attention
from medtrain.trainer.model.compile import compile_layers
from medtrain.trainer.model.fsdp import shard_model
from medtrain.trainer.model.liger import use_liger
from medtrain.trainer.model.lora import Adapters, add_adapters
from medtrain.trainer.model.precision import Fp8
from medtrain.trainer.model.recompute import checkpoint_layers


class PolicyModel(nn.Module):
    """A causal LM that returns the log-probabilities of given next tokens, and logits for generation alone.

    Its parameters carry the names of the Hugging Face model (``model.*``, ``lm_head.weight``). Backbone and head run
    inside this one forward, because FSDP gathers parameters at the forward of its root.
    """

    model: Any  # transformers' decoders share no class that has layers, embed_tokens and rotary_emb

    def __init__(self, hf_model: Any, keep_bytes: int | None, backend: str, compute_dtype: torch.dtype):
        super().__init__()
        self.config: PreTrainedConfig = hf_model.config
        self.backend = backend
        self.compute_dtype = compute_dtype
        self.model = hf_model.model
        self.lm_head = LogpsHead(hf_model.lm_head.weight, keep_bytes=keep_bytes)

    @property
    def tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def reshard_all(self) -> None:
        """Put every parameter back to its shard. FSDP leaves some whole after a forward without backward, and then
        ``parameters()`` are not the ones to load, save or optimize. Its own ``reshard`` is of the root alone."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def forward(self, batch: MicroBatch | None = None, *, padded: dict[str, Any] | None = None) -> Any:
        """Log-probabilities (nats, float32 [N]) of ``batch.targets`` at positions ``batch.counted``; ``batch`` is on the
        model's device.

        ``padded``: instead, what transformers' ``generate`` hands a backbone: rows padded on the left, and their KV cache.
        Gives the logits [rows, 1, V] of the last position, and the decoder's other outputs, its KV cache, by name
        (medtrain.trainer.exam.during).
        """
        if batch is None:
            rest = dict(self.model(**padded or {}))
            return self.lm_head(rest.pop("last_hidden_state")[:, -1:], None), rest
        layout = attention.packed_layout(batch, self.backend)
        output = self.model(
            input_ids=batch.input_ids.unsqueeze(0), position_ids=batch.position_ids.unsqueeze(0), use_cache=False, layout=layout
        )
        # Only the positions that count go into the head.
        return self.lm_head(output.last_hidden_state.squeeze(0).index_select(0, batch.counted), batch.targets)


def build_model(
    config: ModelConfig,
    hf_config: PreTrainedConfig,
    world: World,
    compute_dtype: torch.dtype,
    *,
    backend: str,
    adapters: Adapters | None = None,
    fp8: Fp8 | None = None,
    weights_dtype: torch.dtype = torch.float32,
    layers: str = "torch",
    parallel: ParallelConfig | None = None,
) -> PolicyModel:
    """An empty (unfilled) policy on ``world.device``, sharded as ``parallel`` says where there is a mesh.

    Trained weights are kept in ``weights_dtype`` (adapters in float32), those that ``adapters`` freeze in ``compute_dtype``.
    ``backend`` of attention and ``layers``: as attention.select_backend and liger.select_layers chose.
    """
    with torch.device("meta"):
        hf_model = AutoModelForCausalLM.from_config(
            hf_config,
            dtype=compute_dtype if adapters else weights_dtype,
            attn_implementation=attention.NAME,
            trust_remote_code=False,
        )
        if adapters:
            add_adapters(hf_model, adapters)
        policy = PolicyModel(hf_model, config.keep_bytes, backend, compute_dtype)
        if fp8 is not None:
            from medtrain.trainer.model.fp8 import add_fp8  # torchao, for those who ask for it

            add_fp8(policy.model.layers, fp8, "model.layers")
    if layers == "liger":
        use_liger(policy.model)
    policy.train()
    checkpoint_layers(policy.model.layers, config.activation_checkpointing, adapters.rank if adapters is not None else None)
    if layers == "compiled":
        compile_layers(policy.model.layers, budget=config.activation_budget)
    if world.mesh is not None:
        shard_model(policy, parallel or ParallelConfig(), world, compute_dtype)
    elif compute_dtype != weights_dtype and not adapters:
        raise ValueError("computing in a lower precision than the master weights needs a mesh")
    elif fp8 is not None and fp8.all_gather:
        raise ValueError("gathering in FP8 needs a mesh")
    policy.to_empty(device=world.device)
    if policy.tied and world.mesh is None:
        policy.lm_head.weight = policy.model.embed_tokens.weight  # to_empty unties plain parameters
    with world.device:
        policy.model.rotary_emb = type(policy.model.rotary_emb)(hf_config)
    return policy
