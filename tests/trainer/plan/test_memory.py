"""The memory plan: never below what real steps take, and what the command answers."""

import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import run
from torch.utils._pytree import tree_leaves

from medtrain.benchmarks.plan_check import CASES, compare
from medtrain.kernels.logps import DEFAULT_KEEP_BYTES
from medtrain.trainer.cli import main
from medtrain.trainer.config.settings import ModelConfig, config_from_dict
from medtrain.trainer.errors import InputError
from medtrain.trainer.model.hf_config import load_model_config, parameter_shapes
from medtrain.trainer.model.nf4 import packed_shape
from medtrain.trainer.model.precision import MOMENT_BLOCK
from medtrain.trainer.plan import memory
from medtrain.trainer.plan.command import changed, largest_micro_batch, plan_config
from medtrain.trainer.plan.memory import GIB, plan_memory, read_sizes
from medtrain.trainer.processes import clean_context
from medtrain.trainer.weights.checkpoint import Saver

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FULL = {"activation_checkpointing": "full"}
SIX_BYTES = {"precision": {"weights": "bf16"}, "optim": {"state": "8bit"}}


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(word.split(".")[-1] for word in f"{case[0]} {case[2]}".split()))
def test_a_plan_is_never_below_what_real_steps_take_and_at_most_15_percent_above(case):
    context = clean_context("medtrain.benchmarks.plan_check")
    with ProcessPoolExecutor(1, context) as pool:
        measured, planned = pool.submit(compare, *case).result()
    assert 1 <= planned / measured < 1.15


def config_of(stage="cpt", path="checkpoints/Qwen2.5-72B", **sections):
    rows = {"sources": [{"path": "x"}]} if stage == "cpt" else {"pairs": [{"path": "x"}]}
    tree = {"model": {"path": path}, "data": rows, "optim": {"steps": 1}, "run": {"out": "x"}}
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return config_from_dict(stage, tree)


def plan_of(config, world_size=8):
    return plan_memory(config, read_sizes(config.model), world_size)


@pytest.mark.parametrize(
    "changes", [{}, {"lora": {"rank": 4}}, SIX_BYTES | {"precision": {"weights": "bf16", "compute": "bfloat16"}}]
)
def test_the_copy_of_a_checkpoint_takes_the_host_memory_that_was_planned(changes, cpt_tree, tmp_path, monkeypatch):
    cpt_tree["model"]["init"] |= {"hidden_size": 64, "intermediate_size": 128}
    for name, values in changes.items():
        cpt_tree.setdefault(name, {}).update(values)
    cpt_tree["optim"] |= {"steps": 2, "warmup_steps": 0}
    taken, commit = [], Saver.commit

    def counting(self):
        tensors = [leaf for leaf in tree_leaves(self._copy) if isinstance(leaf, torch.Tensor)]
        taken.append(sum(tensor.nbytes for tensor in tensors if tensor.dim()))  # but for AdamW's step counters
        commit(self)

    monkeypatch.setattr(Saver, "commit", counting)
    result = run("cpt", cpt_tree, tmp_path / "run")
    config = config_from_dict("cpt", cpt_tree | {"run": {"out": str(tmp_path / "run")}})
    sizes = read_sizes(ModelConfig(path=str(result.model_dir)))
    assert taken == [plan_memory(config, sizes, 1).host]
    at_once = replace(config, checkpoint=replace(config.checkpoint, async_save=False))
    assert plan_memory(at_once, sizes, 1).host == 0


def test_the_parts_add_up_to_the_peak():
    for config in (config_of(), config_of("rpo", model=FULL, lora={"rank": 16}), config_of(**SIX_BYTES)):
        plan = plan_of(config)
        assert sum(plan.parts.values()) == pytest.approx(plan.peak) and min(plan.parts.values()) >= 0


def test_weights_gradients_and_moments_of_72b_are_16_bytes_a_parameter_and_6_in_few_bits():
    parameters = read_sizes(config_of().model).parameters
    assert parameters == 72_706_203_648  # as Qwen2.5-72B's safetensors index counts
    for config, least in ((config_of(), 16), (config_of(**SIX_BYTES), 6 + 8 / 128)):  # with a float32 scale for each block
        parts = plan_of(config).parts
        held = parts["weights"] + parts["gradients"] + parts["optimizer"]
        assert least * parameters / 8 <= held < 1.0001 * least * parameters / 8  # norms and biases keep float32 moments


def test_fp8_gathers_half_the_bytes_and_casts_take_room():
    plain = config_of(path="qwen2.5-7b", model=FULL)
    fp8 = config_of(path="qwen2.5-7b", model=FULL, precision={"fp8": "tensorwise"})
    gathered = config_of(path="qwen2.5-7b", model=FULL, precision={"fp8": "tensorwise", "fp8_all_gather": True})
    whole = {name: plan_of(each).parts["gathered weights"] for name, each in (("fp8", fp8), ("gathered", gathered))}
    embedding = 2 * 152_064 * 3584
    assert (whole["fp8"] - embedding) / (whole["gathered"] - embedding) == pytest.approx(2, rel=1e-3)
    assert plan_of(plain).peak < plan_of(gathered).peak < plan_of(fp8).peak


def test_an_nf4_base_costs_nine_sixteenths_of_a_byte_a_weight():
    parts = plan_of(config_of(lora={"rank": 16, "base": "nf4"}, path="qwen2.5-7b"), 1).parts
    linear = 3584 * 3584 * 2 + 3584 * 512 * 2 + 3 * 3584 * 18944
    adapters = 28 * 16 * (2 * 7168 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    others = 7_615_616_512 - 28 * linear  # as Qwen2.5-7B's safetensors index counts
    assert parts["weights"] == 28 * linear * 9 / 16 + 2 * others + 4 * adapters
    assert (parts["gradients"], parts["optimizer"]) == (4 * adapters, 8 * adapters)


def test_constants_are_those_of_the_code_that_is_planned():
    assert (memory.KEEP_BYTES, memory.MOMENT_BLOCK) == (DEFAULT_KEEP_BYTES, MOMENT_BLOCK)
    assert prod(packed_shape(64, 640, torch.bfloat16)) * 2 == 64 * 640 * memory.NF4_BYTES


@pytest.mark.parametrize("world_size", [8, 64, 512])
def test_more_ranks_take_less_and_checkpointing_saves(world_size):
    config, full = config_of(), config_of(model=FULL)
    assert plan_of(full, world_size).peak < plan_of(config, world_size).peak
    assert plan_of(full, 2 * world_size).peak < plan_of(full, world_size).peak


@pytest.mark.parametrize("setting", ["precision.fp8=rowwise", "precision.weights=bf16", "optim.state=8bit", "lora.rank=16"])
def test_settings_that_save_memory_change_the_plan(setting):
    plain, changed = (
        CliRunner().invoke(main, ["plan", str(CONFIGS / "qwen2.5-7b-cpt.yaml"), *words, "--json"]) for words in ([], [setting])
    )
    assert plain.exit_code == changed.exit_code == 0, changed.output
    peaks = [json.loads(done.stdout)["peak_gib"] for done in (plain, changed)]
    assert peaks[1] > peaks[0] if "fp8" in setting else peaks[1] < peaks[0]


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config, limit = config_of("rpo", path="qwen2.5-7b", model=FULL), 79 * GIB
    largest = largest_micro_batch(config, read_sizes(config.model), 8, limit)

    def peak(tokens):
        return plan_of(changed(config, {"optim.micro_batch_tokens": tokens})).peak

    assert peak(largest) <= limit < peak(largest + 256)
    assert largest_micro_batch(config, read_sizes(config.model), 8, GIB) is None


@pytest.mark.parametrize(
    ("config", "gib", "wanted"),
    [
        (config_of("rpo", path="qwen2.5-7b", optim={"micro_batch_tokens": 65_536}), 79, "optim.micro_batch_tokens="),
        (config_of(path="qwen2.5-7b"), 30, "model.activation_checkpointing=full"),
        (
            config_of("rpo", model=FULL, data={"max_length": 2048}),
            79,
            "optim.state=8bit precision.compute=bfloat16 precision.weights=bf16",
        ),
        (config_of(model=FULL), 60, "lora.rank=16"),
        (config_of(model=FULL, lora={"rank": 16}), 30, "lora.base=nf4"),
    ],
)
def test_the_advice_is_the_first_change_that_fits(config, gib, wanted):
    result = plan_config(config, world_size=8, gpu_memory_gib=gib)
    advice, *ranks = result["would_fit"]
    assert not result["fits"] and advice.startswith(wanted)
    pairs = (word.split("=") for word in advice.split())
    taken = changed(config, {name: int(value) if value.isdigit() else value for name, value in pairs})
    assert plan_config(taken, world_size=8, gpu_memory_gib=gib)["fits"]
    for more in ranks:
        assert plan_config(config, world_size=int(more.split()[0]), gpu_memory_gib=gib)["fits"]


def test_where_nothing_fits_there_is_no_advice():
    assert plan_config(config_of(), world_size=1, gpu_memory_gib=3)["would_fit"] == []


def write_config(tmp_path, text="model: {path: Qwen2.5-72B, activation_checkpointing: full}"):
    file = tmp_path / "c.yaml"
    file.write_text(text + "\ndata: {sources: [{path: x}]}\noptim: {steps: 1}\nrun: {out: x}\n")
    return str(file)


def test_the_command_prints_and_its_status_says_whether_it_fits(tmp_path):
    file = write_config(tmp_path)
    done = CliRunner().invoke(main, ["plan", file, "--world-size", "8"])
    assert done.exit_code == 1 and "fits: false" in done.output and "- 32 ranks" in done.output
    done = CliRunner().invoke(main, ["plan", file, "--world-size", "512", "--json"])
    result = json.loads(done.output)
    assert done.exit_code == 0 and result["fits"] and result["would_fit"] == []
    assert sum(result["parts_gib"].values()) == pytest.approx(result["peak_gib"])
    done = CliRunner().invoke(main, ["plan", file, "--world-size", "512", "--gpu-memory-gib", "8"])
    assert done.exit_code == 1
    done = CliRunner().invoke(main, ["plan", file, "parallel.replicate=3"])
    assert done.exit_code == 2 and "a divisor of 8" in done.stderr


def test_a_plan_needs_neither_torch_nor_transformers():
    code = "import sys; from medtrain.trainer.cli import main; main(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    file = str(CONFIGS / "qwen2.5-72b-cpt-1node.yaml")
    done = subprocess.run([sys.executable, "-c", code, "plan", file], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(done.stdout.splitlines()[-1].split())


def test_unknown_sizes_are_a_mistake_that_names_the_way_out(tmp_path):
    done = CliRunner().invoke(main, ["plan", write_config(tmp_path, "model: {path: runs/cpt/model}")])
    assert done.exit_code == 2 and "--sizes" in done.stderr and "qwen2.5-7b" in done.stderr
    with pytest.raises(InputError, match="--sizes"):
        read_sizes(config_of().model, "no-such-model")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no sizes of a model"):
        read_sizes(ModelConfig(path=str(tmp_path)))


def test_sizes_of_an_init_with_a_vocabulary_need_no_tokenizer():
    init = {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_attention_heads": 4}
    sizes = read_sizes(config_of(path=None, model={"init": init, "tokenizer": "nowhere"}).model)
    assert (sizes.vocab_size, sizes.num_key_value_heads, sizes.source) == (100, 4, "model.init")


def test_speed_follows_from_the_share_that_is_given(tmp_path):
    arguments = ["plan", write_config(tmp_path), "data.seq_len=1024", "--world-size", "64", "--json"]
    assert "expected_speed" not in json.loads(CliRunner().invoke(main, arguments).stdout)
    done = CliRunner().invoke(main, [*arguments, "--mfu", "0.4", "--peak-tflops", "100"])
    # 6 a weight that multiplies, 6 * 80 layers * 8192 wide * the length of the document for attention.
    flops = 6 * (72_706_203_648 - 152_064 * 8192) + 6 * 80 * 8192 * 1024
    rate = pytest.approx(0.4 * 100e12 * 64 / flops)
    assert json.loads(done.stdout)["expected_speed"] == {"tokens_per_second": rate, "mfu": 0.4, "peak_tflops": 100.0}


def test_a_setting_without_a_formula_is_refused_rather_than_left_out():
    result = CliRunner().invoke(main, ["plan", str(CONFIGS / "qwen2.5-7b-cpt.yaml"), "model.compile=true"])
    assert result.exit_code == 2 and "model.compile" in result.output and "no formula" in result.output


PLAIN = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_sizes_are_those_of_transformers(tmp_path, model_type, tied):
    content = PLAIN | {"model_type": model_type, "tie_word_embeddings": tied}
    content |= {"sliding_window": None} if model_type == "mistral" else {}
    hf_config = load_model_config(ModelConfig(init=content), None)
    hf_config.save_pretrained(tmp_path)
    shapes = parameter_shapes(hf_config)
    for model in (ModelConfig(init=content), ModelConfig(path=str(tmp_path))):
        sizes = read_sizes(model)
        layer = {name.removeprefix("model.layers.0."): shape for name, shape in shapes.items() if ".layers.0." in name}
        assert {f"{name}.weight": shape for name, shape in sizes.linears.items()}.items() <= layer.items()
        assert sum(map(prod, layer.values())) == sum(map(prod, sizes.linears.values())) + sizes.vectors
        assert sizes.parameters == sum(map(prod, shapes.values()))


@pytest.mark.parametrize(
    "change", [{"model_type": "gemma2"}, {"hidden_size": "64"}, {"num_attention_heads": 0}, {"vocab_size": -1}]
)
def test_sizes_that_no_model_has_are_refused(change):
    with pytest.raises(InputError):
        read_sizes(ModelConfig(init=PLAIN | {"model_type": "qwen2", "tie_word_embeddings": False} | change))
