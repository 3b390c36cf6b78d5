"""LoRA and QLoRA: PEFT's own numbers, the same run on any number of ranks, and only adapters trained, kept and saved."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    SIZES,
    assert_same_curve,
    documents,
    hf_logps,
    kill_in_a_child,
    read_metrics,
    run,
    run_on_ranks,
    without_timing,
)
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM

from medtrain.trainer.config.settings import LoraConfig, ModelConfig
from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import World, join_world
from medtrain.trainer.errors import InputError
from medtrain.trainer.model.flops import num_parameters
from medtrain.trainer.model.hf_config import SUPPORTED_TYPES, load_model_config, load_tokenizer, parameter_shapes
from medtrain.trainer.model.lora import plan_adapters
from medtrain.trainer.model.names import weight_name
from medtrain.trainer.model.nf4 import dequantize, quantize
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.run.export import export_run
from medtrain.trainer.weights.adapters import fill_adapters
from medtrain.trainer.weights.load import Checkpoint, load_weights

ALONE = World(0, 1, torch.device("cpu"), None)
WIDE = SIZES | {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}
KINDS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


@pytest.fixture
def base(tokenizer_dir, tmp_path):
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIDE, vocab_size=24, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(ModelConfig(tokenizer=str(tokenizer_dir))).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """A PEFT adapter whose B is not zero, as some training left it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model = get_peft_model(model, PeftLoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def policy_of(base, lora, world=ALONE, dtype=torch.float32, **settings):
    settings = ModelConfig(path=str(base), **settings)
    hf_config = load_model_config(settings, load_tokenizer(settings))
    adapters = plan_adapters(lora, parameter_shapes(hf_config))
    policy = build_model(settings, hf_config, world, dtype, backend="sdpa", adapters=adapters)
    load_weights(policy, Checkpoint(base))
    fill_adapters(policy, adapters, 0)
    return policy, adapters


@pytest.fixture
def lora_tree(rpo_tree, base):
    rpo_tree["model"] = {"path": str(base)}
    rpo_tree["lora"] = {"rank": 4}
    return rpo_tree


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_log_probs_and_gradients_are_pefts_own(base, adapter, checkpointing):
    policy, adapters = policy_of(base, LoraConfig(path=str(adapter)), activation_checkpointing=checkpointing)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    ours, expected = policy(windows_batch(documents())), hf_logps(theirs, documents())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    weights = torch.linspace(-1, 1, len(ours))
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    expected_gradients = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters()}
    names = {weight_name(name) for name, p in policy.named_parameters() if p.requires_grad}
    assert len(names) == 8 and names == {n for n, grad in expected_gradients.items() if grad is not None}
    for name, param in policy.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(param.grad, expected_gradients[weight_name(name)], rtol=1e-4, atol=1e-6)
        else:
            assert param.grad is None
    assert adapters.num_parameters == sum(p.numel() for p in policy.parameters() if p.requires_grad)


def test_an_nf4_base_computes_as_a_dense_base_of_the_widened_weights(base, adapter, tmp_path):
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if "_proj.weight" in name:
            tensors[name] = dequantize(quantize(tensors[name], torch.float32), torch.float32)
    shutil.copytree(base, tmp_path / "widened")
    save_file(tensors, tmp_path / "widened" / "model.safetensors", metadata={"format": "pt"})
    ours, _ = policy_of(base, LoraConfig(path=str(adapter), base="nf4"))
    dense, _ = policy_of(tmp_path / "widened", LoraConfig(path=str(adapter)))
    for policy in (ours, dense):
        policy(windows_batch(documents())).sum().backward()
    assert torch.equal(ours(windows_batch(documents())), dense(windows_batch(documents())))
    gradients = [[p.grad for p in policy.parameters() if p.requires_grad] for policy in (ours, dense)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    exact, _ = policy_of(base, LoraConfig(path=str(adapter)))
    assert not torch.allclose(exact(windows_batch(documents())), dense(windows_batch(documents())), atol=1e-3)


def _same_on_ranks(base, lora, tied_base):
    with join_world() as world:
        for folder in (base, tied_base):
            sharded, _ = policy_of(folder, lora, world)
            alone, _ = policy_of(folder, lora)
            assert torch.equal(sharded(windows_batch(documents())), alone(windows_batch(documents())))
            sharded.reshard_all()
            for (name, a), b in zip(sharded.named_parameters(), alone.parameters(), strict=True):
                assert torch.equal(a.full_tensor().view(torch.uint8), b.data.view(torch.uint8)), name


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_base_and_adapters_are_the_same_bits_on_three_ranks(base, tmp_path, kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIDE, vocab_size=24, tie_word_embeddings=True))
    shutil.copytree(base, tmp_path / "tied")
    model.save_pretrained(tmp_path / "tied")
    run_on_ranks(3, tmp_path, _same_on_ranks, base, LoraConfig(rank=5, base=kind), tmp_path / "tied")


@pytest.mark.parametrize("stage", ["cpt", "rpo"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_two_ranks_give_the_curve_of_one_process(stage, kind, request, tmp_path):
    tree = request.getfixturevalue(f"{stage}_tree")
    tree["model"]["init"] = WIDE | {"tie_word_embeddings": kind == "nf4"}
    tree["model"]["activation_checkpointing"] = "full" if kind == "nf4" else "none"
    tree["lora"] = {"rank": 4, "base": kind}
    tree["optim"]["steps"] = 12
    run(stage, tree, tmp_path / "one")
    run_on_ranks(2, tmp_path, run, stage, tree, tmp_path / "two")
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    rows = read_metrics(tmp_path / "one")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    a, b = (load_file(tmp_path / f / "adapter" / "adapter_model.safetensors") for f in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize(("stage", "kind"), [("cpt", "nf4"), ("rpo", "dense"), ("rpo", "nf4")])
def test_a_killed_run_started_again_repeats_every_bit_and_saves_no_base(stage, kind, request, base, tmp_path):
    tree = request.getfixturevalue(f"{stage}_tree")
    tree["model"] = {"path": str(base)}
    tree |= {"lora": {"rank": 4, "base": kind}, "checkpoint": {"every": 2, "keep": 1}}
    run(stage, tree, tmp_path / "whole")
    kill_in_a_child(stage, tree, tmp_path / "killed", 3)
    run(stage, tree, tmp_path / "killed")
    assert without_timing(read_metrics(tmp_path / "whole")) == without_timing(read_metrics(tmp_path / "killed"))
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").iterdir()
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert all("lora_" in name or name.startswith("optim.param_groups") for name in stored)
    assert sum(name.startswith("model.") for name in stored) == 28


def test_saved_on_two_ranks_it_goes_on_alone(lora_tree, tmp_path):
    lora_tree["checkpoint"] = {"every": 3}
    run("rpo", lora_tree, tmp_path / "whole")
    run_on_ranks(2, tmp_path, run, "rpo", lora_tree, tmp_path / "moved")
    (tmp_path / "moved" / "checkpoints" / "step-00000006").rename(tmp_path / "moved" / "checkpoints" / "gone.partial")
    shutil.rmtree(tmp_path / "moved" / "model")
    run("rpo", lora_tree, tmp_path / "moved")
    assert_same_curve(tmp_path / "whole", tmp_path / "moved")
    assert len(read_metrics(tmp_path / "moved")) == 6


def test_the_exported_adapter_and_model_are_the_trained_policy(lora_tree, base, tmp_path):
    result = run("rpo", lora_tree, tmp_path / "run")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(result.model_dir)
    ours, _ = policy_of(base, LoraConfig(path=str(tmp_path / "run" / "adapter")))
    expected = ours(windows_batch(documents()))
    torch.testing.assert_close(hf_logps(theirs, documents()), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(hf_logps(merged, documents()), expected, rtol=0, atol=1e-5)
    start = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(hf_logps(start, documents()), expected, atol=1e-2)
    unmerged = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, unmerged[name], rtol=0, atol=1e-6)


def test_an_nf4_run_is_merged_into_the_weights_it_was_trained_on(lora_tree, base, tmp_path):
    lora_tree["lora"]["base"] = "nf4"
    result = run("rpo", lora_tree, tmp_path / "run")
    ours, _ = policy_of(base, LoraConfig(path=str(tmp_path / "run" / "adapter"), base="nf4"))
    merged = hf_logps(AutoModelForCausalLM.from_pretrained(result.model_dir), documents())
    torch.testing.assert_close(merged, ours(windows_batch(documents())), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_medtrain_export_makes_both_folders_of_the_run_again(lora_tree, tmp_path, kind, compute):
    lora_tree |= {"precision": {"compute": compute}, "lora": {"rank": 4, "base": kind}}
    run("rpo", lora_tree, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "merged")
    export_run(tmp_path / "run", tmp_path / "alone", adapter=True)
    for out, made, file in (("merged", "model", "model.safetensors"), ("alone", "adapter", "adapter_model.safetensors")):
        assert (tmp_path / out / file).read_bytes() == (tmp_path / "run" / made / file).read_bytes()
    assert json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["r"] == 4


def test_export_refuses_a_base_that_has_changed_and_an_adapter_of_a_full_run(lora_tree, base, tmp_path):
    run("rpo", lora_tree, tmp_path / "run", lora__merge=False)
    assert not (tmp_path / "run" / "model").exists()
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="other weights than those the run began with"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert (export_run(tmp_path / "run", tmp_path / "alone", adapter=True) / "adapter_config.json").is_file()
    with pytest.raises(InputError, match="weights has changed"):
        run("rpo", lora_tree, tmp_path / "run")
    lora_tree["lora"] = {}
    run("rpo", lora_tree, tmp_path / "full")
    with pytest.raises(InputError, match="no LoRA run"):
        export_run(tmp_path / "full", tmp_path / "out", adapter=True)


def test_a_complete_run_asked_to_merge_after_all_only_merges(lora_tree, tmp_path):
    result = run("rpo", lora_tree, tmp_path / "run", lora__merge=False)
    assert result.model_dir == tmp_path / "run" / "adapter"
    rows = without_timing(read_metrics(tmp_path / "run"))
    result = run("rpo", lora_tree, tmp_path / "run")
    assert result.model_dir == tmp_path / "run" / "model" and (result.model_dir / "config.json").is_file()
    assert without_timing(read_metrics(tmp_path / "run")) == rows


def test_the_reference_is_that_of_a_full_run_bit_for_bit(lora_tree, tmp_path):
    run("rpo", lora_tree, tmp_path / "lora", optim__steps=1)
    lora_tree["lora"] = {}
    run("rpo", lora_tree, tmp_path / "full", optim__steps=1)
    ours, theirs = (sorted((tmp_path / f / "reference").glob("*/part-*.npy")) for f in ("lora", "full"))
    assert [p.parent.name for p in ours] == [p.parent.name for p in theirs]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))
    lora_tree["lora"] = {"rank": 4, "base": "nf4"}
    run("rpo", lora_tree, tmp_path / "nf4", optim__steps=1)
    (other,) = (tmp_path / "nf4" / "reference").iterdir()
    assert other.name != ours[0].parent.name


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_first_step_starts_at_the_reference(lora_tree, tmp_path, kind):
    lora_tree["lora"]["base"] = kind
    run("rpo", lora_tree, tmp_path / "run", optim__steps=1)
    (row,) = read_metrics(tmp_path / "run")
    assert row["dpo_loss"] == pytest.approx(0.693147, abs=1e-5) and abs(row["rewards/margin"]) < 1e-5


def test_a_run_begun_with_an_adapter_takes_it_for_its_reference_and_trains_it_on(lora_tree, base, adapter, tmp_path):
    lora_tree |= {"lora": {"path": str(adapter)}, "checkpoint": {"every": 2}}
    run("rpo", lora_tree, tmp_path / "whole")
    rows = read_metrics(tmp_path / "whole")
    assert rows[0]["dpo_loss"] == pytest.approx(0.693147, abs=1e-5)
    (folder,) = (tmp_path / "whole" / "reference").iterdir()
    (part,) = folder.glob("part-*.npy")
    lora_tree["lora"] = {"rank": 3}
    run("rpo", lora_tree, tmp_path / "fresh", optim__steps=1)
    (other,) = (tmp_path / "fresh" / "reference").glob("*/part-*.npy")
    assert not np.allclose(np.load(part), np.load(other), atol=1e-2)
    lora_tree["lora"] = {"path": str(adapter)}
    kill_in_a_child("rpo", lora_tree, tmp_path / "killed", 3)
    run("rpo", lora_tree, tmp_path / "killed")
    assert without_timing(rows) == without_timing(read_metrics(tmp_path / "killed"))
    config = json.loads((tmp_path / "whole" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (3, 5, ["down_proj", "q_proj"])
    save_file(
        {name: t + 1 for name, t in load_file(adapter / "adapter_model.safetensors").items()},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(InputError, match=r"lora\.path has changed"):
        run("rpo", lora_tree, tmp_path / "killed")
    export_run(tmp_path / "killed", tmp_path / "out")
    ours, theirs = (tmp_path / f / "model.safetensors" for f in ("out", "whole/model"))
    assert ours.read_bytes() == theirs.read_bytes()


def storage_bytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _bytes_are_the_formulas(base, kind):
    with join_world(needs_group=True) as world:
        policy, adapters = policy_of(base, LoraConfig(rank=4, base=kind), world, torch.bfloat16)
        shapes = parameter_shapes(policy.config)
        rank_sum = sum(4 * sum(shapes[n]) for n in shapes if n.split(".")[-2] in KINDS and n.endswith("weight"))
        trained = [p.to_local() for p in policy.parameters() if p.requires_grad]
        assert adapters.num_parameters == rank_sum
        assert sum(p.numel() for p in trained) == rank_sum and all(p.dtype == torch.float32 for p in trained)
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], fused=True)
        policy(windows_batch(documents())).sum().backward()
        optimizer.step()
        moments = [s[k].to_local() for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
        assert storage_bytes(trained) == 4 * rank_sum and storage_bytes(moments) == 8 * rank_sum
        policy.reshard_all()
        frozen = {weight_name(n): p.to_local() for n, p in policy.named_parameters() if not p.requires_grad}
        linears = {n for n in frozen if n.split(".")[-2] in KINDS and n.endswith("weight")}
        num_linear = sum(torch.Size(shapes[n]).numel() for n in linears)
        bytes_each = {"dense": 2, "nf4": 0.5625}[kind]
        assert storage_bytes([frozen[n] for n in linears]) == bytes_each * num_linear
        rest = [p for n, p in frozen.items() if n not in linears]
        assert storage_bytes(rest) == 2 * (num_parameters(shapes)[0] - num_linear)
        return policy


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_memory_is_two_or_nine_sixteenths_of_a_byte_a_frozen_weight_and_twelve_a_trained_one(base, tmp_path, kind):
    run_on_ranks(1, tmp_path, _bytes_are_the_formulas, base, kind)


def _gathers_are_four_bits_wide(base):
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

    sizes, gather = [], DefaultAllGather.__call__

    def counting(self, output_tensor, *arguments, **options):
        sizes.append(output_tensor.nbytes)
        return gather(self, output_tensor, *arguments, **options)

    DefaultAllGather.__call__ = counting
    with join_world() as world:
        policy, _ = policy_of(base, LoraConfig(rank=1, base="nf4", target_modules=["q_proj"]), world, torch.bfloat16)
        with torch.no_grad():
            policy(windows_batch(documents()))
    shapes = parameter_shapes(policy.config)
    layer = [s for n, s in shapes.items() if n.startswith("model.layers.0.")]
    linear = sum(torch.Size(s).numel() for s in layer if len(s) == 2)
    rest = sum(torch.Size(s).numel() for s in layer if len(s) == 1)
    # A unit's rows are padded to the same number on both ranks; here only the adapter's single row of A is.
    expected = 0.5625 * linear + 2 * rest + 2 * (2 * 64 + 64)
    assert sizes.count(expected) == 2, (sizes, expected)


def test_gathers_of_an_nf4_layer_are_four_bits_wide(base, tmp_path):
    run_on_ranks(2, tmp_path, _gathers_are_four_bits_wide, base)


def test_bfloat16_follows_float32_and_its_head_is_frozen(lora_tree, base, tmp_path):
    for kind in ("dense", "nf4"):
        lora_tree["lora"]["base"] = kind
        run("rpo", lora_tree, tmp_path / f"{kind}-f32")
        run("rpo", lora_tree, tmp_path / f"{kind}-bf16", precision__compute="bfloat16")
        for a, b in zip(read_metrics(tmp_path / f"{kind}-f32"), read_metrics(tmp_path / f"{kind}-bf16"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=3e-2) and a["loss"] != b["loss"]
    policy, _ = policy_of(base, LoraConfig(rank=2))
    assert not policy.lm_head.weight.requires_grad


def test_the_first_values_of_an_adapter_are_drawn_as_peft_draws_them(base):
    policy, _ = policy_of(base, LoraConfig(rank=16))
    torch.manual_seed(0)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), PeftLoraConfig(r=16, target_modules=list(KINDS)))
    expected = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters()}
    for name, param in policy.named_parameters():
        if param.requires_grad:
            other = expected[weight_name(name)]
            assert param.shape == other.shape
            param, other = param.detach(), other.detach()
            assert float(param.std()) == pytest.approx(float(other.std()), rel=0.1)
            assert float(param.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.05)


def test_the_manifest_says_what_is_trained(lora_tree, tmp_path):
    run("rpo", lora_tree, tmp_path / "run", optim__steps=1)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    counted = sum(t.numel() for t in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values())
    assert manifest["parameters"]["trained"] == counted
    assert manifest["parameters"]["all"] - counted == sum(
        t.numel() for t in load_file(tmp_path / "run" / "model" / "model.safetensors").values()
    )
    assert manifest["adapters"] == {"rank": 4, "alpha": 8.0, "target_modules": list(KINDS), "base": "dense"}


@pytest.mark.parametrize("model_type", SUPPORTED_TYPES)
def test_adapters_go_on_every_linear_layer_of_every_kind_of_model(model_type):
    hf_config = AutoConfig.for_model(**WIDE | {"model_type": model_type}, vocab_size=24)
    shapes = parameter_shapes(hf_config)
    adapters = plan_adapters(LoraConfig(rank=2), shapes)
    assert adapters.targets == KINDS
    policy = build_model(ModelConfig(path=""), hf_config, ALONE, torch.float32, backend="sdpa", adapters=adapters)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(KINDS) * 2 and set(shapes) == {
        weight_name(n) for n, _ in policy.named_parameters() if n not in trained
    }


def test_adapters_of_another_kind_or_model_are_named(base, adapter):
    settings = ModelConfig(path=str(base))
    shapes = parameter_shapes(load_model_config(settings, load_tokenizer(settings)))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, message in (
        ({"use_dora": True}, "'use_dora': only plain LoRA"),
        ({"bias": "all"}, "'bias': only plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed weights"),
        ({"peft_type": "IA3"}, "another kind of adapter"),
        ({"r": 4}, r"lora_A.*does not fit the model"),
        ({"r": None}, "unreadable"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            plan_adapters(LoraConfig(path=str(adapter)), shapes)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != first}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="found nothing"):
        plan_adapters(LoraConfig(path=str(adapter)), shapes)
    narrow = {name: tuple(n // 2 for n in shape) for name, shape in shapes.items()}
    with pytest.raises(InputError, match="cannot be cut into NF4 blocks.*multiple of 64"):
        plan_adapters(LoraConfig(rank=2, base="nf4"), narrow)
