"""The memory plan: what it says beside what real steps take, and what the command answers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from medtrain.benchmarks.plan_error import run_case, write_data
from medtrain.trainer import plan_report
from medtrain.trainer.cli import main
from medtrain.trainer.config import config_from_dict
from medtrain.trainer.errors import InputError
from medtrain.trainer.plan import GIB, Machine, read_model, units
from medtrain.trainer.plan_report import alternatives, largest_micro_batch, make_plan, model_sizes, plan_config

SMALL = {"model.init.hidden_size": 128, "model.init.intermediate_size": 352, "model.init.num_hidden_layers": 4}
# Layers so wide beside their tokens that what FSDP gathers and reduces decides the peak.
WIDE = {"model.init.hidden_size": 768, "model.init.intermediate_size": 2112, "model.init.vocab_size": 512}
BF16, FULL = {"precision.compute": "bfloat16"}, {"model.activation_checkpointing": "full"}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_data(folder)
    return folder


@pytest.mark.parametrize(
    "case",
    [
        (1, "cpt", {"model.init.vocab_size": 1024}),
        (2, "cpt", BF16 | FULL | WIDE),
        (8, "cpt", {"model.init.tie_word_embeddings": True, "model.init.vocab_size": 2048}),
        (2, "rpo", BF16 | {"model.init.vocab_size": 1024}),
        (2, "cpt", BF16 | {"lora.rank": 8, "model.init.vocab_size": 512}),
        (2, "cpt", BF16 | {"model.activation_checkpointing": "selective", "model.init.vocab_size": 512}),
        (4, "cpt", BF16 | FULL | WIDE | {"parallel.replicate": 2}),
        (2, "cpt", BF16 | FULL | WIDE | {"parallel.reshard_after_forward": False}),
        (2, "cpt", BF16 | FULL | WIDE | {"parallel.prefetch": 2}),
    ],
    ids=[
        "alone",
        "bf16 checkpointing",
        "tied on 8 ranks",
        "rpo",
        "lora",
        "selective",
        "copies",
        "whole layers",
        "ahead",
    ],
)
def test_the_plan_is_near_what_a_real_step_allocates(case, made_up):
    ranks, stage, changes = case
    row = run_case((ranks, stage, SMALL | changes), made_up)
    assert row["planned_bytes"]["held"] == pytest.approx(row["measured_bytes"]["held"], rel=0.01)
    assert abs(row["error"]) < 0.06, row
    assert row["planned_bytes"]["backward"] == pytest.approx(row["measured_bytes"]["backward"], rel=0.08)


def config_of(stage="cpt", path="checkpoints/Qwen2.5-72B", **sections):
    rows = {"sources": [{"path": "x"}]} if stage == "cpt" else {"pairs": [{"path": "x"}]}
    tree = {"model": {"path": path}, "data": rows, "optim": {"steps": 1}, "run": {"out": "x"}}
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return config_from_dict(stage, tree)


def plan_of(config, world_size):
    return make_plan(config, read_model(config, model_sizes(config.model)[0]), Machine(world_size))


def test_weights_gradients_and_moments_of_72b_are_16_bytes_a_parameter():
    plan = plan_of(config_of(), 8)
    parts = plan.largest.parts
    assert plan.model.num_parameters == 72_706_203_648  # as Qwen2.5-72B's safetensors index counts
    held = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert held == pytest.approx(16 * plan.model.num_parameters / 8, rel=1e-6)


def test_an_nf4_base_costs_nine_sixteenths_of_a_byte_a_weight():
    config = config_of(lora={"rank": 16, "base": "nf4"}, path="qwen2.5-7b")
    layer, head, root = units(read_model(config, model_sizes(config.model)[0]), 1, torch.bfloat16, True)
    linear = 3584 * 3584 * 2 + 3584 * 512 * 2 + 3 * 3584 * 18944
    adapters = 16 * (2 * 7168 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert layer.stored == linear * 9 // 16 + 2 * (2 * 3584 + 3584 + 2 * 512) + 4 * adapters
    assert layer.trained == adapters and head.trained == root.trained == 0


@pytest.mark.parametrize("world_size", [8, 64, 512])
def test_more_ranks_take_less_and_checkpointing_saves(world_size):
    config = config_of()
    full = replace(config, model=replace(config.model, activation_checkpointing="full"))
    assert plan_of(full, world_size).peak < plan_of(config, world_size).peak
    assert plan_of(full, 2 * world_size).peak < plan_of(full, world_size).peak


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config = config_of("rpo", path="qwen2.5-7b", model={"activation_checkpointing": "full"})
    plan, limit = plan_of(config, 8), 79 * GIB
    largest = largest_micro_batch(plan, limit)

    def peak(tokens):
        return plan_of(replace(config, optim=replace(config.optim, micro_batch_tokens=tokens)), 8).peak

    assert peak(largest) <= limit < peak(largest + 256)


def test_what_is_said_to_fit_fits_when_it_is_planned_by_itself():
    plan = plan_of(config_of("rpo", model={"activation_checkpointing": "full"}), 8)
    tried = {each["change"]: each for each in alternatives(plan, 79 * GIB)}
    assert not tried["optim.micro_batch_tokens=8192"]["fits"] and tried["32 ranks"]["fits"]
    alone = plan_of(config_of("rpo", model={"activation_checkpointing": "full"}, lora={"rank": 16}), 8)
    assert tried["lora.rank=16"] == {"change": "lora.rank=16", "peak_gib": alone.peak / GIB, "fits": True}


def write_config(tmp_path, text="model: {path: Qwen2.5-72B}"):
    file = tmp_path / "c.yaml"
    file.write_text(text + "\ndata: {sources: [{path: x}]}\noptim: {steps: 1}\nrun: {out: x}\n")
    return str(file)


def test_the_command_prints_and_its_status_says_whether_it_fits(tmp_path):
    file = write_config(tmp_path)
    done = CliRunner().invoke(main, ["plan", file, "--world-size", "8", "model.activation_checkpointing=full"])
    assert done.exit_code == 1 and "DOES NOT FIT 79 GiB" in done.output and "32 ranks" in done.output
    assert "no rate has been measured" in done.output
    done = CliRunner().invoke(
        main, ["plan", file, "--world-size", "512", "--json", "model.activation_checkpointing=full"]
    )
    result = json.loads(done.output)
    assert done.exit_code == 0 and result["fits"] and result["alternatives"] == []
    assert sum(result["parts_gib"].values()) == pytest.approx(result["peak_gib"])
    done = CliRunner().invoke(main, ["plan", file, "--world-size", "512", "--gpu-memory-gib", "8"])
    assert done.exit_code == 1


def test_unknown_sizes_are_a_mistake_that_names_the_way_out(tmp_path):
    done = CliRunner().invoke(main, ["plan", write_config(tmp_path, "model: {path: runs/cpt/model}")])
    assert done.exit_code == 2 and "--sizes" in done.stderr and "qwen2.5-7b" in done.stderr
    with pytest.raises(InputError, match="--sizes"):
        model_sizes(config_of().model, "no-such-model")


def test_sizes_of_an_init_with_a_vocabulary_need_no_tokenizer():
    init = {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_attention_heads": 4}
    hf_config, source = model_sizes(config_of(path=None, model={"init": init, "tokenizer": "nowhere"}).model)
    assert (hf_config.vocab_size, hf_config.num_key_value_heads, source) == (100, 4, "model.init")


def test_speed_is_told_from_measured_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_report, "RESULTS", tmp_path)
    row = {"impl": "medtrain", "model": "Qwen2.5-72B", "precision": "bfloat16", "tokens_per_second": 123.0}
    rows = [row, row | {"impl": "trl"}, row | {"precision": "float32"}, row | {"model": "Qwen2.5-7B"}]
    assert plan_config(config_of(), world_size=64, gpu_memory_gib=79)["measured_rates"] == []
    (tmp_path / "train-cpt-h100-2030-01-01.json").write_text(json.dumps({"rows": rows}))
    found = plan_config(config_of(), world_size=64, gpu_memory_gib=79)["measured_rates"]
    assert found == [{"tokens_per_second": 123.0, "file": "train-cpt-h100-2030-01-01.json"}]


@pytest.mark.parametrize(
    "setting", ["model.compile=true", "precision.fp8=rowwise", "precision.weights=bf16", "optim.state=8bit"]
)
def test_a_setting_without_a_formula_is_refused_rather_than_left_out(setting):
    config = Path(__file__).resolve().parents[2] / "configs" / "qwen2.5-7b-cpt.yaml"
    result = CliRunner().invoke(main, ["plan", str(config), setting, "--world-size", "8"])
    assert result.exit_code == 2 and setting.split("=")[0] in result.output and "no formula" in result.output
