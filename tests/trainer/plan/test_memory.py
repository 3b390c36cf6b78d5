"""The memory plan: what it says beside what real steps take, and what the command answers."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import run
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from medtrain.benchmarks.plan_error import run_case, write_data
from medtrain.trainer.cli import main
from medtrain.trainer.config.settings import ModelConfig, config_from_dict
from medtrain.trainer.errors import InputError
from medtrain.trainer.model.policy import load_model_config, parameter_shapes
from medtrain.trainer.plan import command as plan_report
from medtrain.trainer.plan.command import MODELS, alternatives, largest_micro_batch, make_plan, model_sizes, plan_config
from medtrain.trainer.plan.memory import GIB, Machine, checkpoint_copy, read_model, units
from medtrain.trainer.plan.sizes import read_sizes, shapes_of
from medtrain.trainer.weights.checkpoint import Saver

SMALL = {"model.init.hidden_size": 128, "model.init.intermediate_size": 352, "model.init.num_hidden_layers": 4}
# Layers so wide beside their tokens that what FSDP gathers and reduces decides the peak.
WIDE = {"model.init.hidden_size": 512, "model.init.intermediate_size": 1408, "model.init.vocab_size": 512}
BF16, FULL = {"precision.compute": "bfloat16"}, {"model.activation_checkpointing": "full"}
SIX_BYTES = {"precision.weights": "bf16", "optim.state": "8bit"}
FP8 = {"precision.fp8": "tensorwise", "precision.fp8_emulate": True, "precision.fp8_all_gather": True}


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
        (2, "cpt", BF16 | FULL | WIDE | SIX_BYTES),
        (2, "cpt", BF16 | FULL | WIDE | FP8),
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
        "6 bytes a parameter",
        "fp8",
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


@pytest.mark.parametrize(
    "changes", [{}, {"lora__rank": 4}, {"optim__state": "8bit", "precision__weights": "bf16", "precision__compute": "bfloat16"}]
)
def test_the_copy_of_a_checkpoint_takes_the_host_memory_that_was_planned(changes, cpt_tree, tmp_path, monkeypatch):
    cpt_tree["model"]["init"] |= {"hidden_size": 64, "intermediate_size": 128}
    for name, value in changes.items():
        section, key = name.split("__")
        cpt_tree.setdefault(section, {})[key] = value
    cpt_tree["optim"] |= {"steps": 2, "warmup_steps": 0}
    taken, commit = [], Saver.commit

    def counting(self):
        tensors = [leaf for leaf in tree_leaves(self._copy) if isinstance(leaf, torch.Tensor)]
        taken.append(sum(tensor.nbytes for tensor in tensors if tensor.dim()))  # but for AdamW's step counters
        commit(self)

    monkeypatch.setattr(Saver, "commit", counting)
    result = run("cpt", cpt_tree, tmp_path / "run")
    config = config_from_dict("cpt", cpt_tree | {"run": {"out": str(tmp_path / "run")}})
    hf_config = AutoConfig.from_pretrained(result.model_dir)
    assert taken == [checkpoint_copy(config, read_model(config, hf_config), Machine(1, "cpu"))]
    assert checkpoint_copy(replace(config, checkpoint=replace(config.checkpoint, async_save=False)), None, None) == 0


def test_weights_gradients_and_moments_of_72b_are_16_bytes_a_parameter():
    plan = plan_of(config_of(), 8)
    parts = plan.largest.parts
    assert plan.model.num_parameters == 72_706_203_648  # as Qwen2.5-72B's safetensors index counts
    held = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert held == pytest.approx(16 * plan.model.num_parameters / 8, rel=1e-6)


def test_bf16_weights_and_8_bit_moments_are_6_bytes_a_parameter():
    config = config_of(precision={"weights": "bf16"}, optim={"state": "8bit"})
    parts = plan_of(config, 8).largest.parts
    blocks = 72_706_203_648 // 128  # a float32 scale each, for both moments
    held = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert held == pytest.approx((6 * 72_706_203_648 + 8 * blocks) / 8, rel=1e-4)
    # Rows of 29,568 and 8,192 are whole blocks; norms and biases keep float32 moments.
    assert held > (6 * 72_706_203_648 + 8 * blocks) / 8


def test_fp8_gathers_half_the_bytes_and_casts_take_room():
    config = config_of(path="qwen2.5-7b", model={"activation_checkpointing": "full"})
    fp8 = replace(config, precision=replace(config.precision, fp8="tensorwise"))
    gathered = replace(fp8, precision=replace(fp8.precision, fp8_all_gather=True))
    model = read_model(config, model_sizes(config.model)[0])
    plain, half = (units(each, model, Machine(8), torch.bfloat16, True)[0] for each in (fp8, gathered))
    assert plain.whole / half.whole == pytest.approx(2, rel=1e-3) and plain.stored == half.stored
    peaks = {name: plan_of(each, 8).peak for name, each in (("bf16", config), ("fp8", fp8), ("gathered", gathered))}
    assert peaks["bf16"] < peaks["gathered"] < peaks["fp8"]


def test_an_nf4_base_costs_nine_sixteenths_of_a_byte_a_weight():
    config = config_of(lora={"rank": 16, "base": "nf4"}, path="qwen2.5-7b")
    layer, head, root = units(config, read_model(config, model_sizes(config.model)[0]), Machine(1), torch.bfloat16, True)
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
    small = plan_of(
        config_of("rpo", model={"activation_checkpointing": "full"}, optim={"state": "8bit"}, precision={"weights": "bf16"}), 8
    )
    assert tried["optim.state=8bit precision.weights=bf16"]["peak_gib"] == small.peak / GIB
    assert not tried["optim.state=8bit"]["fits"] and not tried["precision.weights=bf16"]["fits"]
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
    done = CliRunner().invoke(main, ["plan", file, "--world-size", "512", "--json", "model.activation_checkpointing=full"])
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
    row = {
        "impl": "medtrain",
        "model": "72b",
        "parameters": 72_706_203_648,
        "trained": "all weights",
        "precision": "bfloat16",
        "tokens_per_second": 123.0,
        "mfu": 0.5,
    }
    others = [row | {"impl": "trl"}, row | {"precision": "float32"}, row | {"trained": "LoRA rank 16"}]
    small = row | {"parameters": 7_615_616_512, "model": "7b", "tokens_per_second": 9.0, "mfu": 0.25}

    def planned(**options):
        found = plan_config(config_of(data={"seq_len": 1024}), world_size=64, gpu_memory_gib=79, **options)
        return found["measured_rates"], found["expected_speed"]

    assert planned() == ([], None)
    file = tmp_path / "train-cpt-h100-2030-01-01.json"
    file.write_text(json.dumps({"rows": [small, *others]}))
    rates, expected = planned()
    assert rates == [] and expected["mfu"] == 0.25 and expected["from"] == f"{file.name}, 7b on one device"
    file.write_text(json.dumps({"rows": [row, small, *others]}))
    assert planned()[0] == [{"tokens_per_second": 123.0, "file": file.name}]
    assert planned()[1]["mfu"] == 0.5
    # 6 a weight that multiplies, 6 * 80 layers * 8192 wide * the length of the document for attention.
    flops = 6 * (72_706_203_648 - 152_064 * 8192) + 6 * 80 * 8192 * 1024
    assert planned(mfu=0.4, peak_tflops=100.0)[1] == {
        "tokens_per_second": pytest.approx(0.4 * 100e12 * 64 / flops),
        "mfu": 0.4,
        "peak_tflops": 100.0,
        "from": "given",
    }


def test_a_setting_without_a_formula_is_refused_rather_than_left_out():
    config = Path(__file__).resolve().parents[3] / "configs" / "qwen2.5-7b-cpt.yaml"
    result = CliRunner().invoke(main, ["plan", str(config), "model.compile=true", "--world-size", "8"])
    assert result.exit_code == 2 and "model.compile" in result.output and "no formula" in result.output


@pytest.mark.parametrize("setting", ["precision.fp8=rowwise", "precision.weights=bf16", "optim.state=8bit"])
def test_every_setting_of_precision_changes_the_plan(setting):
    config = str(Path(__file__).resolve().parents[3] / "configs" / "qwen2.5-7b-cpt.yaml")
    plain, changed = (CliRunner().invoke(main, ["plan", config, *words, "--json"]) for words in ([], [setting]))
    assert plain.exit_code == changed.exit_code == 0, changed.output
    assert json.loads(plain.stdout)["peak_gib"] != json.loads(changed.stdout)["peak_gib"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_plain_sizes_are_those_of_transformers(tmp_path, model_type, tied):
    content = {
        "model_type": model_type,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "tie_word_embeddings": tied,
    }
    content |= {"head_dim": 16} if model_type == "qwen3" else {}
    content |= {"sliding_window": None} if model_type == "mistral" else {}
    hf_config = load_model_config(ModelConfig(init=content), None)
    hf_config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for sizes in (read_sizes(content, from_user=True), read_sizes(written, from_user=False)):
        assert shapes_of(sizes) == parameter_shapes(hf_config)
        for field in dataclasses.fields(sizes):
            theirs = getattr(hf_config, field.name, None)
            assert getattr(sizes, field.name) == (theirs or 12 if field.name == "head_dim" else theirs)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma2"},
        {"hidden_size": 50},
        {"hidden_size": "64"},
        {"vocab_size": None},
        {"num_layers": 3},
        {"attention_bias": True},
        {"layer_types": ["sliding_attention"]},
        {"tie_word_embeddings": None},
        {"head_dim": None},
        {"model_type": "qwen3"},
        {"model_type": "mistral"},
        {"quantization_config": {"bits": 4}},
        {"attention_dropout": 0.1},
    ],
)
def test_what_is_not_plain_is_left_to_transformers(change):
    plain = json.loads((MODELS / "qwen2.5-7b.json").read_text())
    assert read_sizes(plain, from_user=True) is not None and read_sizes(plain | change, from_user=True) is None
