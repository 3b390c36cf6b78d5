"""Verification before the first step passes what was loaded rightly and finds whatever was not, on any number of ranks."""

import builtins
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import SIZES, kill_in_a_child, run, run_on_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from medtrain.trainer.config.settings import LoraConfig, ModelConfig
from medtrain.trainer.distributed import World, join_world
from medtrain.trainer.errors import InputError
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer, parameter_shapes
from medtrain.trainer.model.lora import plan_adapters
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.weights import load as weights
from medtrain.trainer.weights import safetensors, verify
from medtrain.trainer.weights.adapters import fill_adapters
from medtrain.trainer.weights.export import export_model
from medtrain.trainer.weights.load import Checkpoint, load_weights

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def hf_folder(tokenizer_dir, tmp_path):
    def make(model_type="qwen2", tied=False, dtype=torch.float32, **sizes):
        torch.manual_seed(0)
        sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 24, "tie_word_embeddings": tied, **sizes}
        sizes |= {"model_type": model_type} | ({"sliding_window": None} if model_type == "mistral" else {})
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
        for name, p in model.named_parameters():
            if name.endswith(".bias"):  # Hugging Face begins them at 0, where leaving them out would not show
                torch.nn.init.normal_(p)
        model.to(dtype).save_pretrained(tmp_path / "hf")
        load_tokenizer(ModelConfig(tokenizer=str(tokenizer_dir))).save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"

    return make


def loaded(folder, world=ALONE, compute=torch.float32, lora=None, weights_dtype=torch.float32):
    settings = ModelConfig(path=str(folder))
    hf_config = load_model_config(settings, None)
    adapters = plan_adapters(lora, parameter_shapes(hf_config)) if lora else None
    policy = build_model(settings, hf_config, world, compute, backend="sdpa", adapters=adapters, weights_dtype=weights_dtype)
    load_weights(policy, Checkpoint(folder))
    if adapters:
        fill_adapters(policy, adapters, 0)
    return policy, adapters


def proved(folder, world=ALONE, **options):
    policy, adapters = loaded(folder, world, **options)
    return verify.verify_weights(policy, Checkpoint(folder), adapters, world, forward=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_every_family_passes_and_so_does_its_export(hf_folder, tmp_path, model_type, tied):
    folder = hf_folder(model_type, tied, dtype=torch.bfloat16)
    found = proved(folder)
    assert found["forward"]["mean_difference"] < 1e-5 and found["forward"]["tokens"] == 31
    assert found["tensors"] == len(load_file(folder / "model.safetensors")) and found["unused"] == []
    policy, _ = loaded(folder)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    out = export_model(policy, tokenizer, tmp_path / "out", ALONE, dtype=torch.bfloat16, source=folder)
    a, b = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert proved(out)["forward"] == found["forward"]


def _passes_on_ranks(folder, adapter):
    with join_world() as world:
        assert proved(folder, world)["forward"]["mean_difference"] < 1e-5
        bf16 = proved(folder, world, compute=torch.bfloat16)["forward"]
        assert 1e-5 < bf16["mean_difference"] < bf16["tolerance"] / 2
        proved(folder, world, compute=torch.bfloat16, weights_dtype=torch.bfloat16)
        found = proved(folder, world, lora=LoraConfig(path=str(adapter)))
        assert found["forward"]["mean_difference"] < 1e-5
        assert proved(folder, world, lora=LoraConfig(rank=2, base="nf4"))["forward"] == "the base is rounded to 4 bits"


def test_two_ranks_lower_precision_and_adapters_pass(hf_folder, tmp_path):
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    folder = hf_folder()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), PeftLoraConfig(init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    run_on_ranks(2, tmp_path, _passes_on_ranks, folder, tmp_path / "adapter")


def test_tensors_that_have_no_place_are_told(hf_folder):
    folder = hf_folder()
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.2.mlp.up_proj.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    found = proved(folder)
    assert found["unused"] == ["model.layers.2.mlp.up_proj.weight"]
    assert "1 tensors of the files unused" in verify.describe(found)


# What a loader may get wrong of one tensor.
ERRORS = {
    "skipped": lambda values: torch.zeros_like(values),
    "rows shifted": lambda values: values.roll(1, 0),
    "columns shifted": lambda values: values.roll(1, 1),
    "one bit": lambda values: torch.cat([values.view(-1)[:-1], values.view(-1)[-1:] * (1 + 2**-20)]).view_as(values),
    "read as another dtype": lambda values: values.half().view(torch.bfloat16).float(),
}


def _planted(folder, error, nf4):
    """Spoil rank 0's part of one tensor, or of all ranks where they are one."""
    fill = weights._fill

    def spoiling(local, values, name):
        if "layers.1.mlp.up_proj" in name and (world.rank == 0):
            values = ERRORS[error](values)
        fill(local, values, name)

    with join_world() as world:
        weights._fill = spoiling
        try:
            with pytest.raises(InputError, match=r"not those of .*found model\.layers\.1\.mlp\.up_proj\.weight differ"):
                proved(folder, world, lora=LoraConfig(rank=2, base="nf4") if nf4 else None)
        finally:
            weights._fill = fill


@pytest.mark.parametrize("error", ERRORS)
def test_one_tensor_loaded_wrongly_is_named(hf_folder, error):
    _planted(hf_folder(), error, nf4=False)


@pytest.mark.parametrize(("error", "nf4"), [("rows shifted", False), ("rows shifted", True), ("skipped", True)])
def test_a_part_loaded_wrongly_by_one_of_three_ranks_is_named_on_all(hf_folder, tmp_path, error, nf4):
    run_on_ranks(3, tmp_path, _planted, hf_folder(), error, nf4)


def _on_two_replicas(folder, out):
    """Two copies of the model, each on two ranks; the second copy is spoilt."""
    fill = weights._fill
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    world = World(dist.get_rank(), 4, torch.device("cpu"), mesh)
    assert proved(folder, world)["forward"]["mean_difference"] < 1e-5
    policy, _ = loaded(folder, world)
    export_model(policy, load_tokenizer(ModelConfig(path=str(folder))), out, world, dtype=torch.float32)

    def spoiling(local, values, name):
        if "layers.1.mlp" in name and world.rank >= 2:
            values = values.roll(1, 0)
        fill(local, values, name)

    weights._fill = spoiling
    try:
        with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight and 2 others differ"):
            proved(folder, world)
    finally:
        weights._fill = fill


def test_each_copy_of_a_replicated_model_is_compared(hf_folder, tmp_path):
    folder = hf_folder()
    run_on_ranks(4, tmp_path, _on_two_replicas, folder, tmp_path / "out")
    a, b = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_blocks_of_rows_are_compared_to_the_last(hf_folder, monkeypatch):
    monkeypatch.setattr(safetensors, "BLOCK_BYTES", 5 * 64 * 4)  # 128 rows: 25 blocks of 5 and one of 3
    proved(hf_folder())
    _planted(hf_folder(), "one bit", nf4=False)


def _used_wrongly(folder, change):
    with join_world() as world:
        policy, adapters = loaded(folder, world)
        change(policy)
        with pytest.raises(InputError, match="is not Hugging Face's model"):
            verify.verify_weights(policy, Checkpoint(folder), adapters, world, forward=True)
        verify.verify_weights(policy, Checkpoint(folder), adapters, world, forward=False)


def _other_rope(policy):
    policy.model.rotary_emb.inv_freq.mul_(0.5)


def _other_eps(policy):
    for layer in policy.model.layers:
        layer.input_layernorm.variance_epsilon = 0.1


@pytest.mark.parametrize("change", [_other_rope, _other_eps])
def test_right_bytes_used_wrongly_are_found_by_the_forward(hf_folder, tmp_path, change):
    run_on_ranks(2, tmp_path, _used_wrongly, hf_folder(), change)


def _failing_elsewhere(folder):
    with join_world() as world:
        policy, _ = loaded(folder, world)
        (folder / "config.json").unlink(missing_ok=True)
        with pytest.raises(InputError, match=r"Hugging Face's forward failed; model\.proof=tensors .*found ValueError"):
            verify.verify_weights(policy, Checkpoint(folder), None, world, forward=True)


def test_what_rank_0_cannot_load_ends_every_rank(hf_folder, tmp_path):
    run_on_ranks(2, tmp_path, _failing_elsewhere, hf_folder())


def test_a_model_too_large_for_the_host_is_compared_by_its_tensors(hf_folder, monkeypatch):
    monkeypatch.setattr(verify, "free_host_bytes", lambda: 1000)
    found = proved(hf_folder())
    assert found["forward"].endswith("GB in float32, of 0.0 GB allowed") and found["tensors"] == 27
    assert "not compared with Hugging Face's forward" in verify.describe(found)


@pytest.mark.parametrize("says", [True, False])
def test_a_machine_without_proc_compares_where_it_knows_its_memory_and_says_so_where_not(hf_folder, monkeypatch, says):
    opened = builtins.open

    def refuse(file, *args, **kwargs):
        if str(file).startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(2, "No such file or directory", file)
        return opened(file, *args, **kwargs)

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(builtins, "open", refuse)
    if not says:
        monkeypatch.setattr(os, "sysconf", unknown)
    found = proved(hf_folder())["forward"]
    assert found["mean_difference"] < 1e-5 if says else found.endswith("of 0.0 GB allowed")


def proofs(out):
    return [start.get("proof") for start in json.loads((Path(out) / "manifest.json").read_text())["starts"]]


def test_a_run_proves_once_and_writes_it_down(cpt_tree, hf_folder, tmp_path, capfd):
    del cpt_tree["model"]["init"]
    cpt_tree["model"]["path"] = str(hf_folder())
    cpt_tree["checkpoint"] = {"every": 2}
    kill_in_a_child("cpt", cpt_tree, tmp_path / "run", 4)
    run("cpt", cpt_tree, tmp_path / "run")
    first, second = proofs(tmp_path / "run")
    assert first["forward"]["mean_difference"] < 1e-5 and first["seconds"] > 0 and second.keys() == {"architecture"}
    run("cpt", cpt_tree, tmp_path / "tensors", model__proof="tensors")
    run("cpt", cpt_tree, tmp_path / "none", model__proof="none")
    assert proofs(tmp_path / "tensors")[0]["forward"] == "not asked for" and proofs(tmp_path / "none") == [None]


def test_a_run_of_random_weights_proves_its_architecture(cpt_tree, tmp_path):
    run("cpt", cpt_tree, tmp_path / "run", optim__steps=3)
    (found,) = proofs(tmp_path / "run")
    assert found.keys() == {"architecture"} and found["architecture"]["largest_difference"] < 1e-4
    assert "a small qwen2, packed and up to position" in verify.describe(found)
    run("cpt", cpt_tree, tmp_path / "none", optim__steps=3, model__proof="none")
    assert proofs(tmp_path / "none") == [None]


def test_an_fp8_run_is_proved_without_fp8(cpt_tree, hf_folder, tmp_path):
    pytest.importorskip("torchao")
    del cpt_tree["model"]["init"]
    cpt_tree["model"]["path"] = str(hf_folder())
    cpt_tree["precision"] = {"fp8": "tensorwise", "fp8_emulate": True, "fp8_all_gather": True}
    run("cpt", cpt_tree, tmp_path / "run", optim__steps=3)
    assert proofs(tmp_path / "run")[0]["forward"]["mean_difference"] < 1e-5
