"""Compiled layers: the curve of uncompiled ones, one graph for ragged packs and all layers, and nothing but the budget kept."""

import numpy as np
import pytest
import torch
import torch._dynamo
from helpers import SIZES, assert_same_curve, read_metrics, run, run_on_ranks
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion

from medtrain.trainer.config.settings import ModelConfig, config_from_dict
from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import World
from medtrain.trainer.errors import InputError
from medtrain.trainer.model import compile as compiling
from medtrain.trainer.model.hf_config import load_model_config
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.train.setup import check
from medtrain.trainer.weights.load import init_weights

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Graphs traced and differentiated as on a GPU, run by torch's own operations."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = 1.0


def policy_of(mode="none", layers="compiled", backend="sdpa", num_layers=3, **settings):
    sizes = {**SIZES, "vocab_size": 24, "num_hidden_layers": num_layers}
    config = ModelConfig(init=sizes, activation_checkpointing=mode, compile=layers == "compiled", **settings)
    policy = build_model(config, load_model_config(config, None), ALONE, torch.float32, backend=backend, layers=layers)
    init_weights(policy, 0)
    return policy


def ragged(num_packs):
    generator = np.random.default_rng(0)
    for num_documents in [3, 1, 4, *generator.integers(1, 6, size=num_packs - 3)]:
        lengths = generator.integers(2, 40, size=num_documents)
        yield windows_batch([generator.integers(0, 20, size=n).astype(np.uint32) for n in lengths])


# First: torch 2.11 cannot fork once this process has run a compiled backward.
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"lora": {"rank": 2}}, 1e-5),
        ({"parallel": {"replicate": 2}, "model": {"activation_checkpointing": "full"}}, 1e-5),
        ({"precision": {"compute": "bfloat16", "fp8": "tensorwise", "fp8_emulate": True, "fp8_all_gather": True}}, 3e-2),
    ],
    ids=["lora", "copies-checkpointing", "fp8"],
)
def test_compiled_layers_are_sharded_adapted_and_in_fp8(changes, tolerance, cpt_tree, tmp_path):
    if "precision" in changes:
        pytest.importorskip("torchao", reason="torchao is not installed")
        cpt_tree["model"]["init"] |= {"hidden_size": 32, "intermediate_size": 48}
    cpt_tree["optim"]["steps"] = 3
    for section, values in changes.items():
        cpt_tree.setdefault(section, {}).update(values)
    ranks = 4 if "parallel" in changes else 2
    run_on_ranks(ranks, tmp_path, run, "cpt", cpt_tree, tmp_path / "as-written")
    cpt_tree["model"]["compile"] = True
    run_on_ranks(ranks, tmp_path, run, "cpt", cpt_tree, tmp_path / "compiled")
    for a, b in zip(read_metrics(tmp_path / "as-written"), read_metrics(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)


@pytest.mark.parametrize(
    "mode",
    [
        "none",
        pytest.param(
            "selective", marks=pytest.mark.skipif(torch.__version__ < "2.13", reason="refused: makes a graph for each length")
        ),
    ],
)
def test_ragged_packs_and_all_layers_share_a_graph(mode, graphs, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    policy = policy_of(mode)
    for i, batch in enumerate(ragged(10)):
        policy(batch).sum().backward()
        if i == 2:
            after_three = graphs["stats"]["unique_graphs"]
    # A single document may have one of its own.
    assert graphs["stats"]["unique_graphs"] == after_three <= 2
    assert not graphs["graph_break"]


def test_selective_checkpointing_is_not_compiled_by_a_torch_that_gives_up(cpt_tree, monkeypatch):
    cpt_tree["model"] |= {"compile": True, "activation_checkpointing": "selective"}
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    with pytest.raises(InputError, match=r"model\.activation_checkpointing.*found selective, torch 2\.11\.0"):
        check(config_from_dict("cpt", cpt_tree))


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_gradients_are_those_of_uncompiled_layers(mode):
    batch = next(ragged(3))
    found = []
    for layers in ("torch", "compiled"):
        policy = policy_of(mode, layers, num_layers=2)
        policy(batch).sum().backward()
        found.append([p.grad for p in policy.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["cpt", "rpo"])
def test_the_curve_and_the_files_are_those_of_an_uncompiled_run(stage, request, tmp_path, graphs):
    tree = request.getfixturevalue(f"{stage}_tree")
    run(stage, tree, tmp_path / "as-written")
    result = run(stage, tree, tmp_path / "compiled", model__compile=True)
    assert graphs["stats"]["unique_graphs"] and not graphs["graph_break"]
    assert_same_curve(tmp_path / "as-written", tmp_path / "compiled")
    assert "compiled" in (result.run_dir / "manifest.json").read_text()
    from safetensors import safe_open

    names = [set(safe_open(tmp_path / f / "model" / "model.safetensors", "pt").keys()) for f in ("as-written", "compiled")]
    assert names[0] == names[1]


def kept_numbers(budget):
    """How many numbers compiled layers keep from forward to backward under a budget."""
    torch._dynamo.reset()
    policy = policy_of("budget", num_layers=1, activation_budget=budget)
    weights = {p.data_ptr() for p in policy.parameters()}
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel() if tensor.data_ptr() not in weights else 0
        return tensor

    layer = policy.model.layers[0]
    forward = layer.forward

    def counted(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return forward(*args, **kwargs)

    layer.forward = counted
    policy(next(ragged(3))).sum().backward()
    return kept


def test_a_smaller_budget_keeps_less(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")
    assert kept_numbers(0.0) < kept_numbers(1.0)


def test_the_attention_of_a_gpu_is_part_of_the_graph(monkeypatch):
    """torch's varlen attention cannot run here; its graph can be made."""
    seen = []

    class Traced(Exception):
        pass

    def only_traced(graph, _):
        seen.append(sorted({str(node.target) for node in graph.graph.nodes if "attn" in str(node.target)}))

        def refuse(*_):
            raise Traced

        return refuse

    monkeypatch.setattr(compiling, "BACKEND", aot_autograd(fw_compiler=only_traced, bw_compiler=only_traced))
    with pytest.raises(Traced):
        policy_of("selective", backend="torch_varlen", num_layers=1)(next(ragged(3)))
    assert seen[0] == ["torch_attn._varlen_attn.default"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"activation_checkpointing": "budget", "activation_budget": 0.5}, "model.compile=true"),
        ({"activation_checkpointing": "budget", "compile": True}, "activation_budget.*missing"),
        ({"activation_budget": 0.5, "compile": True}, "no effect without a budget"),
        ({"activation_checkpointing": "budget", "activation_budget": 1.5, "compile": True}, "0 to 1"),
        ({"kernels": "liger", "compile": True}, "model.kernels"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(model, message, cpt_tree):
    cpt_tree["model"] |= model
    with pytest.raises(InputError, match=message):
        config_from_dict("cpt", cpt_tree)


def test_nf4_is_refused(cpt_tree):
    cpt_tree["model"]["compile"] = True
    with pytest.raises(InputError, match="model.compile.*NF4"):
        config_from_dict("cpt", cpt_tree | {"lora": {"rank": 4, "base": "nf4"}})
