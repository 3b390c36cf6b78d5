"""Liger's layers in a policy: its kernels in Triton's interpreter, the same numbers, names and weights; other models stay."""

import sys

import pytest
import torch
from helpers import SIZES, documents
from transformers import AutoModelForCausalLM

from medtrain.trainer.config.settings import ModelConfig, config_from_dict
from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import World
from medtrain.trainer.errors import InputError
from medtrain.trainer.model.hf_config import load_model_config
from medtrain.trainer.model.liger import select_layers
from medtrain.trainer.model.lora import Adapters
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.train.setup import check
from medtrain.trainer.weights.adapters import fill_adapters
from medtrain.trainer.weights.load import init_weights

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"), None)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@triton.jit
def _rsqrt(x):
    return 1.0 / tl.sqrt(x)


class _Scalar(float):
    def to(self, _):
        return self


@pytest.fixture
def interpreted(monkeypatch):
    """What Triton's interpreter lacks of what Liger's norm asks for: scalars that are cast, and libdevice."""
    from liger_kernel.ops import rms_norm, swiglu
    from liger_kernel.transformers import rms_norm as layer

    own = layer.LigerRMSNormFunction

    class WithScalars:
        @staticmethod
        def apply(x, weight, eps, offset, *rest):
            return own.apply(x, weight, _Scalar(eps), _Scalar(offset), *rest)

    monkeypatch.setattr(layer, "LigerRMSNormFunction", WithScalars)
    monkeypatch.setattr(rms_norm, "rsqrt", _rsqrt)
    monkeypatch.setattr(swiglu, "float", _Scalar, raising=False)  # in front of the built-in one


def policy_of(layers, model_type="qwen2", mode="none", adapters=None):
    sizes = {**SIZES, "vocab_size": 24, "num_hidden_layers": 1, "model_type": model_type}
    if model_type == "mistral":
        sizes["sliding_window"] = None
    config = ModelConfig(init=sizes, activation_checkpointing=mode)
    policy = build_model(
        config, load_model_config(config, None), ALONE, torch.float32, backend="sdpa", layers=layers, adapters=adapters
    )
    init_weights(policy, 0)
    if adapters is not None:
        fill_adapters(policy, adapters, 0)
    return policy


ADAPTERS = Adapters(4, 8.0, ("q_proj", "gate_proj", "up_proj"), None, "dense", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize(
    ("model_type", "mode", "adapters"),
    [("qwen2", "none", None), ("qwen3", "selective", None), ("llama", "selective", ADAPTERS), ("mistral", "full", None)],
)
def test_log_probs_and_gradients_are_those_of_torchs_layers(model_type, mode, adapters, interpreted):
    found = []
    for layers in ("torch", "liger"):
        policy = policy_of(layers, model_type, mode, adapters)
        logps = policy(windows_batch(documents()[:2]))
        logps.sum().backward()
        found.append([logps, *(p.grad for p in policy.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_norms_mlps_and_rotary_are_replaced_and_names_and_other_models_are_not(interpreted, monkeypatch):
    from liger_kernel.ops import LigerRopeFunction

    rotated = []
    rotate = LigerRopeFunction.apply
    monkeypatch.setattr(LigerRopeFunction, "apply", lambda *args: rotated.append(args) or rotate(*args))
    modeling = sys.modules["transformers.models.qwen2.modeling_qwen2"]
    own = dict(vars(modeling))
    plain, liger = policy_of("torch"), policy_of("liger")
    assert vars(modeling) == own
    assert plain.state_dict().keys() == liger.state_dict().keys()
    replaced = {name for name, module in liger.named_modules() if "forward" in vars(module)}
    layer = "model.layers.0"
    assert replaced == {
        f"{layer}.self_attn",
        f"{layer}.mlp",
        f"{layer}.input_layernorm",
        f"{layer}.post_attention_layernorm",
        "model.norm",
    }
    batch = windows_batch(documents()[:1])
    liger(batch)
    assert len(rotated) == 1 and vars(modeling) == own
    plain(batch)
    theirs = AutoModelForCausalLM.from_config(plain.config)
    assert len(rotated) == 1 and not any("forward" in vars(module) for module in theirs.modules())


@pytest.mark.parametrize(
    ("settings", "device", "layers"),
    [
        ({}, CPU, "torch"),
        ({}, CUDA, "liger"),
        ({"kernels": "torch"}, CUDA, "torch"),
        ({"kernels": "liger"}, CUDA, "liger"),
        ({"compile": True}, CUDA, "compiled"),
    ],
)
def test_the_layers_are_chosen_once(settings, device, layers, caplog):
    caplog.set_level("INFO", "medtrain")
    config = ModelConfig(init={**SIZES, "vocab_size": 24}, **settings)
    assert select_layers(config, load_model_config(config, None), device) == layers
    assert not [record for record in caplog.records if record.name.startswith("medtrain")]


def _no_longer_there(**_):
    raise AttributeError("no attribute 'Qwen2RMSNorm'")


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (_no_longer_there, "AttributeError: no attribute 'Qwen2RMSNorm'"),
        (lambda **_: None, "RuntimeError: Liger left transformers.models.qwen2.modeling_qwen2.apply_rotary_pos_emb as it was"),
        (None, "not installed: pip install"),
    ],
)
def test_where_liger_cannot_be_put_in_auto_takes_torchs_layers_and_says_why(apply, words, monkeypatch, caplog):
    caplog.set_level("INFO", "medtrain")
    if apply is None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setattr("liger_kernel.transformers.apply_liger_kernel_to_qwen2", apply)
    config = ModelConfig(init={**SIZES, "vocab_size": 24})
    hf_config = load_model_config(config, None)
    assert select_layers(config, hf_config, CUDA) == "torch"
    said = [record.getMessage() for record in caplog.records if record.name.startswith("medtrain")]
    assert len(said) == 1 and words in said[0]
    with pytest.raises(InputError, match="model.kernels"):
        select_layers(ModelConfig(init=config.init, kernels="liger"), hf_config, CUDA)


def test_liger_without_a_gpu_or_with_another_activation_is_refused(cpt_tree):
    cpt_tree["model"]["kernels"] = "liger"
    with pytest.raises(InputError, match="model.kernels.*found cpu"):
        check(config_from_dict("cpt", cpt_tree))
    gelu = ModelConfig(init={**SIZES, "vocab_size": 24, "hidden_act": "gelu"}, kernels="liger")
    with pytest.raises(InputError, match="hidden_act gelu"):
        select_layers(gelu, load_model_config(gelu, None), CUDA)
