"""What we rely on of PEFT: layers injected into a decoder on meta under these names, switched off by ``_disable_adapters``,
and its adapter_config.json. That its own model computes the same is in tests/trainer/model/test_lora.py."""

import torch
from helpers import SIZES, documents

from medtrain.trainer.config.settings import ModelConfig
from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import World
from medtrain.trainer.model.hf_config import load_model_config
from medtrain.trainer.model.lora import Adapters, without_adapters
from medtrain.trainer.model.names import is_adapter
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.weights.adapters import fill_adapters
from medtrain.trainer.weights.load import init_weights

ADAPTERS = Adapters(4, 8.0, ("q_proj", "down_proj"), None, "dense", 0)


def policy_of(adapters):
    config = ModelConfig(init={**SIZES, "vocab_size": 24})
    alone = World(0, 1, torch.device("cpu"), None)
    policy = build_model(config, load_model_config(config, None), alone, torch.float32, backend="sdpa", adapters=adapters)
    init_weights(policy, 0)
    if adapters is not None:
        fill_adapters(policy, adapters, 0)
    return policy


def test_names_and_shapes_of_what_is_injected():
    shapes = {name: tuple(p.shape) for name, p in policy_of(ADAPTERS).named_parameters() if p.requires_grad}
    assert len(shapes) == 2 * 2 * SIZES["num_hidden_layers"] and all(map(is_adapter, shapes))
    assert shapes["model.layers.1.mlp.down_proj.lora_A.default.weight"] == (4, SIZES["intermediate_size"])
    assert shapes["model.layers.1.mlp.down_proj.lora_B.default.weight"] == (SIZES["hidden_size"], 4)


def test_adapters_scale_by_alpha_over_rank_and_can_be_switched_off():
    plain, policy, batch = policy_of(None), policy_of(ADAPTERS), windows_batch(documents())
    with torch.no_grad():
        for name, param in policy.named_parameters():
            if ".lora_B." in name:
                param.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        weights = dict(plain.named_parameters())
        for layer in policy.model.layers:
            for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
                merged = (8.0 / 4) * module.lora_B["default"].weight @ module.lora_A["default"].weight
                next(w for w in weights.values() if torch.equal(w, module.base_layer.weight)).add_(merged)
        torch.testing.assert_close(policy(batch), plain(batch), rtol=0, atol=1e-5)
        with without_adapters(policy):
            assert torch.equal(policy(batch), policy_of(None)(batch))


def test_its_configuration_file_is_written_without_a_model(tmp_path):
    config = ADAPTERS.peft_config("base")
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).target_modules == {"q_proj", "down_proj"}
