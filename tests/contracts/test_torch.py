"""What we rely on of torch beside what the whole recipe shows (test_recipe.py): names that are not public, functions that
only CUDA runs, and where a shard of a parameter lies."""

import inspect

import pytest
import torch
from helpers import run_on_ranks

from medtrain.trainer.distributed import local_part
from medtrain.trainer.model import compile
from medtrain.trainer.model import recompute as checkpointing


def _shards_lie_where_local_part_says():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.arange(21.0).view(7, 3)  # 7 rows on 2 ranks: 4 and 3
    param = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
    local, part = local_part(param)
    assert torch.equal(local, whole[part]) and len(local) in (4, 3)


def test_where_the_shard_of_a_parameter_lies(tmp_path):
    run_on_ranks(2, tmp_path, _shards_lie_where_local_part_says)


def test_variable_length_attention_takes_what_it_is_given_on_cuda():
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(names)


def test_selective_checkpointing_knows_attention_by_its_name():
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    with torch.profiler.profile(acc_events=True) as profile:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert checkpointing._ATTENTION & {event.name for event in profile.events()}
    own = [name for name in checkpointing._ATTENTION if name.startswith("aten::")]
    assert all(hasattr(torch.ops.aten, name.removeprefix("aten::")) for name in own)


def test_settings_of_the_compiler_are_where_they_were():
    assert isinstance(torch._dynamo.config.recompile_limit, int)
    assert torch._functorch.config.activation_memory_budget == 1.0
    assert callable(torch._dynamo.maybe_mark_dynamic) and compile.BACKEND in torch.compiler.list_backends()


def test_errors_of_a_distributed_checkpoint_are_no_exceptions_of_the_usual_kind(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    with pytest.raises(CheckpointException):
        dcp.load({"a": torch.zeros(2)}, checkpoint_id=tmp_path, no_dist=True)
    assert not issubclass(CheckpointException, Exception)
