"""What each way of activation checkpointing keeps and computes again, beside the same log-probabilities and gradients."""

import pytest
import torch
from helpers import SIZES, assert_same_curve, documents, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from medtrain.trainer.config.settings import ModelConfig
from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import World
from medtrain.trainer.model.hf_config import load_model_config
from medtrain.trainer.model.lora import Adapters
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.model.precision import Fp8
from medtrain.trainer.weights.adapters import fill_adapters
from medtrain.trainer.weights.load import init_weights

ALONE = World(0, 1, torch.device("cpu"), None)
WIDE = SIZES | {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
MISTRAL = {"mistral": {"sliding_window": None}}
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FP8 = Fp8("rowwise", False, True, frozenset(f"model.layers.{i}.mlp.{n}.weight" for i in (0, 1) for n in ALL_LINEAR[4:]), {})


def policy_of(mode, model_type="qwen2", adapters=None, fp8=None):
    sizes = {**WIDE, "model_type": model_type, "vocab_size": 24} | MISTRAL.get(model_type, {})
    settings = ModelConfig(init=sizes, activation_checkpointing=mode)
    policy = build_model(
        settings, load_model_config(settings, None), ALONE, torch.float32, backend="sdpa", adapters=adapters, fp8=fp8
    )
    init_weights(policy, 0)
    if adapters is not None:
        fill_adapters(policy, adapters, 0)
        torch.manual_seed(0)
        for name, param in policy.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(param)
    return policy


class AttentionCalls(TorchDispatchMode):
    """Counts calls of attention."""

    attention = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.attention += op._schema.name.startswith("aten::_scaled_dot_product")
        return op(*args, **(kwargs or {}))


def recomputed(mode, model_type="qwen2"):
    """FLOPs of a backward less those of one without checkpointing."""
    flops = {}
    for each in ("none", mode):
        logps = policy_of(each, model_type)(windows_batch(documents())).sum()
        with FlopCounterMode(display=False) as counter:
            logps.backward()
        flops[each] = counter.get_total_flops()
    return flops[mode] - flops["none"]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_selective_computes_again_q_k_v_and_gate_alone(model_type):
    tokens = sum(len(d) - 1 for d in documents())
    head_dim = AutoConfig.for_model(**WIDE | {"model_type": model_type}).to_dict().get("head_dim") or 16
    queries, keys, inner, hidden = 4 * head_dim, 2 * head_dim, 192, 64
    flops = 2 * tokens * hidden * (queries + 2 * keys + inner) * 2  # two layers
    assert recomputed("selective", model_type) == flops


def test_full_computes_again_all_but_what_nobody_needs():
    tokens, hidden, inner = sum(len(d) - 1 for d in documents()), 64, 192
    # q, k, v, o, gate, up; attention, which FlopCounterMode does not see on a CPU, aside. down_proj's output is not needed.
    assert recomputed("full") == 2 * tokens * (2 * hidden * hidden + 2 * hidden * 32 + 2 * hidden * inner) * 2


def attention_calls(mode):
    logps = policy_of(mode)(windows_batch(documents())).sum()
    with AttentionCalls() as counted:
        logps.backward()
    return counted.attention


def test_attention_is_computed_again_by_full_and_not_by_selective():
    assert attention_calls("full") == 2 * attention_calls("selective") > 0
    assert attention_calls("selective") == attention_calls("none")


ADAPTERS = Adapters(4, 8.0, ALL_LINEAR, None, "dense", 0)
CASES = {
    "plain": {},
    "qwen3": {"model_type": "qwen3"},
    "lora": {"adapters": ADAPTERS},
    "qlora": {"adapters": Adapters(4, 8.0, ALL_LINEAR, None, "nf4", 0)},
    "fp8": {"fp8": FP8},
}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_gradients_are_the_same_bits(mode, case):
    if case == "fp8":
        pytest.importorskip("torchao", reason="torchao is not installed")
    found = []
    for each in ("none", mode):
        policy = policy_of(each, **CASES[case])
        logps = policy(windows_batch(documents()))
        logps.sum().backward()
        found.append([logps, *(p.grad for p in policy.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("stage", ["cpt", "rpo"])
def test_the_curve_is_the_same(stage, request, tmp_path):
    tree = request.getfixturevalue(f"{stage}_tree")
    run(stage, tree, tmp_path / "none")
    run(stage, tree, tmp_path / "selective", model__activation_checkpointing="selective")
    assert_same_curve(tmp_path / "none", tmp_path / "selective")
