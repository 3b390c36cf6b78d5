"""FP8, 8-bit moments and bfloat16 weights: beside float32, at any world size, killed and resumed, exported, guarded."""

import copy
import json
import math

import pytest
import torch
from helpers import SIZES, assert_same_curve, kill_in_a_child, read_metrics, run, run_on_ranks, without_timing
from transformers import AutoModelForCausalLM

from medtrain.trainer.config.settings import config_from_dict
from medtrain.trainer.errors import InputError
from medtrain.trainer.model.precision import load_torchao
from medtrain.trainer.run.export import export_run
from medtrain.trainer.train.setup import check

pytest.importorskip("torchao", reason="torchao is not installed")
load_torchao("tests")

# Rows of 128 and 256: what 8-bit moments and FP8 ask for. k_proj and v_proj are [64, 128].
WIDE = SIZES | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}
TENSORWISE = {"fp8": "tensorwise", "fp8_emulate": True}
ROWWISE = {"fp8": "rowwise", "fp8_emulate": True}
GATHERED = TENSORWISE | {"fp8_all_gather": True}
BF16 = {"compute": "bfloat16", "weights": "bf16"}


@pytest.fixture
def tree(cpt_tree):
    cpt_tree["model"]["init"] = dict(WIDE)
    cpt_tree["optim"] |= {"lr": 2e-3}
    return cpt_tree


def losses(run_dir):
    return [row["loss"] for row in read_metrics(run_dir) if "loss" in row]


# 30 steps of a longer curve: benchmarks/results/precision-cpu-2026-11-22.json.
@pytest.mark.parametrize(
    ("precision", "state", "tolerance"),
    [(TENSORWISE, "fp32", 0.08), (ROWWISE, "fp32", 0.08), ({}, "8bit", 0.01), (BF16, "fp32", 0.02), (BF16, "8bit", 0.02)],
    ids=["tensorwise", "rowwise", "8bit", "bf16", "bf16-8bit"],
)
def test_the_curve_follows_float32(tree, tmp_path, precision, state, tolerance):
    tree["optim"]["steps"] = 15
    run("cpt", tree, tmp_path / "float32")
    tree["precision"] = precision
    run("cpt", tree, tmp_path / "other", optim__state=state)
    plain, other = losses(tmp_path / "float32"), losses(tmp_path / "other")
    assert plain[-1] < plain[0] - 0.2
    difference = max(abs(a - b) for a, b in zip(plain, other, strict=True))
    assert 0 < difference < tolerance


SAME = [
    # Activations are scaled by what a rank's micro-batch holds, so that FP8 rounds them differently on two ranks.
    pytest.param(GATHERED, "fp32", 2e-2, id="fp8-all-gather"),
    pytest.param(GATHERED | {"compute": "bfloat16"}, "fp32", 2e-2, id="fp8-all-gather-bf16"),
    pytest.param(TENSORWISE, "fp32", 2e-2, id="tensorwise"),
    pytest.param(ROWWISE, "fp32", 2e-2, id="rowwise"),
    pytest.param({}, "8bit", 1e-4, id="8bit"),
    pytest.param(BF16, "8bit", 2e-3, id="bf16-8bit"),
]


@pytest.mark.parametrize(("precision", "state", "tolerance"), SAME)
def test_two_ranks_give_the_losses_of_one(tree, tmp_path, precision, state, tolerance):
    tree["precision"] = precision
    tree["optim"] |= {"state": state}
    run("cpt", tree, tmp_path / "one")
    run_on_ranks(2, tmp_path, run, "cpt", tree, tmp_path / "two")
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=tolerance)


@pytest.mark.parametrize(
    ("precision", "state"), [(GATHERED | BF16, "8bit"), (ROWWISE, "fp32"), (BF16, "fp32")], ids=["all", "rowwise", "bf16"]
)
def test_a_killed_run_started_again_repeats_every_bit(tree, tmp_path, precision, state):
    tree["precision"] = precision | ({"fp8_check_every": 2} if "fp8" in precision else {})
    tree["optim"] |= {"state": state, "steps": 8}
    tree["checkpoint"] = {"every": 2}
    run("cpt", tree, tmp_path / "whole")
    kill_in_a_child("cpt", tree, tmp_path / "killed", 5)
    run("cpt", tree, tmp_path / "killed")
    assert without_timing(read_metrics(tmp_path / "whole")) == without_timing(read_metrics(tmp_path / "killed"))
    whole, killed = ((tmp_path / f / "model" / "model.safetensors").read_bytes() for f in ("whole", "killed"))
    assert whole == killed


def test_saved_on_three_ranks_eight_bit_moments_go_on_alone(tree, tmp_path):
    tree["optim"] |= {"state": "8bit"}
    tree["checkpoint"] = {"every": 2}
    run("cpt", tree, tmp_path / "whole")
    run_on_ranks(3, tmp_path, kill_on_ranks, tree, tmp_path / "moved")
    run("cpt", tree, tmp_path / "moved")
    assert_same_curve(tmp_path / "whole", tmp_path / "moved", tolerance=1e-4)


def kill_on_ranks(tree, out):
    from medtrain.trainer.weights.checkpoint import Saver

    commit = Saver.commit

    def committing(self):
        commit(self)
        if self._pending[0] == 4:
            raise KeyboardInterrupt

    Saver.commit = committing
    with pytest.raises(KeyboardInterrupt):
        run("cpt", tree, out)


@pytest.mark.parametrize("precision", [GATHERED, ROWWISE], ids=["fp8-all-gather", "rowwise"])
def test_the_export_of_an_fp8_run_is_a_plain_model_with_its_held_out_loss(tree, tmp_path, precision):
    tree["data"]["heldout"] = tree["data"]["sources"]
    tree["precision"] = precision
    result = run("cpt", tree, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    export_run(tmp_path / "run", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (result.model_dir / "model.safetensors").read_bytes()
    # Trained on by nothing, the exported weights have the held-out loss that the run reported at its end.
    del tree["model"]["init"], tree["precision"]
    tree["model"] |= {"path": str(result.model_dir)}
    run("cpt", tree, tmp_path / "after", optim__steps=1, optim__warmup_steps=0)
    name = "heldout/corpus/bits_per_byte"
    assert read_metrics(tmp_path / "after")[0][name] == pytest.approx(result.metrics[name], rel=1e-6)


def test_checkpoints_of_an_fp8_run_hold_plain_tensors(tree, tmp_path):
    from torch.distributed.checkpoint import FileSystemReader

    tree["precision"] = GATHERED
    run("cpt", tree, tmp_path / "run", optim__state="8bit")
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert found["model.model.layers.0.mlp.up_proj.weight"].properties.dtype == torch.float32
    assert found["optim.state.model.layers.0.mlp.up_proj.weight.exp_avg"].properties.dtype == torch.uint8
    for file in folder.glob("*.distcp"):
        assert b"torchao" not in file.read_bytes()


def test_the_manifest_says_what_computes_in_fp8_and_what_does_not(tree, tmp_path):
    tree["model"]["init"] |= {"intermediate_size": 200, "num_hidden_layers": 1, "tie_word_embeddings": False}
    tree["precision"] = ROWWISE
    run("cpt", tree, tmp_path / "run", optim__steps=3)
    about = json.loads((tmp_path / "run" / "manifest.json").read_text())["fp8"]
    assert about["matrices"] == {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1}
    assert about["not_in_fp8"] == {"embedding or head": 2, "with a dim that is no multiple of 16": 3}
    assert about["recipe"] == "rowwise" and about["emulated"]


def test_fp8_in_rpo_begins_with_the_reference_of_a_run_without(rpo_tree, tmp_path):
    rpo_tree["model"]["init"] = dict(WIDE)
    rpo_tree["optim"] |= {"lr": 1e-3, "steps": 3}
    run("rpo", rpo_tree, tmp_path / "plain")
    rpo_tree["precision"] = ROWWISE
    run("rpo", rpo_tree, tmp_path / "fp8")
    a, b = (next((tmp_path / f / "reference").glob("*/part-*.npy")).read_bytes() for f in ("plain", "fp8"))
    assert a == b
    first = read_metrics(tmp_path / "fp8")[0]
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=0.05) and first["dpo_loss"] != pytest.approx(math.log(2), abs=1e-6)


# The guard


def watched(tree, **precision):
    tree["precision"] = TENSORWISE | {"fp8_check_every": 2} | precision
    return tree


def test_the_shadow_loss_is_that_of_the_same_step_without_fp8(tree, tmp_path):
    # One micro-batch a step, so that the step's own losses with and without FP8 differ by what the check must find.
    tree["optim"] |= {"steps": 3, "micro_batch_tokens": 4096}
    run("cpt", tree, tmp_path / "plain")
    run("cpt", watched(tree), tmp_path / "fp8")
    plain, fp8 = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "fp8")
    found = fp8[0]["fp8/shadow_loss_difference"]
    assert found == pytest.approx(fp8[0]["loss"] - plain[0]["loss"], abs=2e-6) and abs(found) > 1e-5
    assert [row["step"] for row in fp8 if "fp8/shadow_loss_difference" in row] == [1, 3]
    assert all(row["fp8/nonfinite_gradients"] == 0 for row in fp8)
    assert 0 < fp8[0]["fp8/saturated_share"] < 0.01 and 0 < fp8[0]["fp8/underflow_share"] < 0.01


def plant(monkeypatch, change):
    """Have ``change(layer, x)`` make what FP8 layers return from what they were given, from the second step's end on."""
    from medtrain.trainer.model import fp8

    layer, rescale, planted = fp8.FP8Linear.forward, fp8.Guard.rescale, []

    def forward(self, x):
        return layer(self, change(x)) if len(planted) >= 2 and not self.plain else layer(self, x)

    monkeypatch.setattr(fp8.FP8Linear, "forward", forward)
    monkeypatch.setattr(fp8.Guard, "rescale", lambda self: (rescale(self), planted.append(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.clone().index_fill_(-1, torch.tensor([0]), torch.nan), "not finite"),
        (lambda x: x * 1e38, "not finite"),
        (lambda x: x * 1.5, r"from the one without FP8, more than precision\.fp8_tolerance"),
    ],
    ids=["nan", "overflow", "drift"],
)
def test_the_guard_stops_what_is_planted_and_keeps_the_checkpoint(tree, tmp_path, monkeypatch, change, message):
    plant(monkeypatch, change)
    tree["checkpoint"] = {"every": 1}
    with pytest.raises(RuntimeError, match=rf"step 3: FP8: .*{message}"):
        run("cpt", watched(tree, fp8_tolerance=0.01), tmp_path / "run")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    monkeypatch.undo()
    run("cpt", tree, tmp_path / "run")
    run("cpt", tree, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_warning_goes_on_where_that_is_asked_for(tree, tmp_path, monkeypatch, capsys):
    from medtrain.trainer.train.loop import train

    plant(monkeypatch, lambda x: x * 1.5)
    tree = watched(tree, fp8_tolerance=0.01, fp8_guard="warn")
    tree["run"]["out"] = str(tmp_path / "run")
    train(config_from_dict("cpt", tree))
    assert len(losses(tmp_path / "run")) == 6
    assert "warning: step 3: FP8: the loss is" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_is_counted_and_stops_before_the_update(tree, tmp_path, monkeypatch):
    from medtrain.trainer.model import fp8

    backward = fp8.FP8Linear.forward

    def forward(self, x):
        y = backward(self, x)
        if y.requires_grad and self.out_features == 256:  # gate and up of both layers
            y.register_hook(lambda grad: grad.clone().index_fill_(-1, torch.tensor([0]), torch.inf))
        return y

    monkeypatch.setattr(fp8.FP8Linear, "forward", forward)
    with pytest.raises(RuntimeError, match=r"step 1: .*not finite, stopped before .* [1-9]\d* FP8 weights have such gradients"):
        run("cpt", watched(tree), tmp_path / "run")


# What is refused


def refused(tree, match, **sections):
    tree = copy.deepcopy(tree)
    for section, settings in sections.items():
        tree.setdefault(section, {}).update(settings)
    with pytest.raises(InputError, match=match):
        check(config_from_dict("cpt", tree))


def test_settings_that_cannot_work_or_have_no_effect_are_refused(tree):
    refused(tree, r"'precision\.fp8': this device has no FP8 \(found cpu", precision={"fp8": "rowwise"})
    refused(tree, "has no effect without FP8", precision={"fp8_check_every": 5})
    refused(tree, "has no effect without FP8", precision={"fp8_emulate": True})
    refused(tree, "one scale per weight", precision=ROWWISE | {"fp8_all_gather": True})
    refused(tree, "not supported with adapters", precision=ROWWISE, lora={"rank": 4})
    refused(tree, "no effect with adapters", precision=BF16, lora={"rank": 4})
    refused(tree, "computed with as they are", precision={"weights": "bf16", "compute": "float32"})
    refused(tree, "computed with as they are", precision={"weights": "bf16"})  # auto is float32 on a CPU
    refused(tree, "out of range", precision=ROWWISE | {"fp8_tolerance": 0.0})
    refused(tree, "no matrix has 8-bit moments", optim={"state": "8bit"}, model={"init": dict(SIZES)})
    odd = dict(SIZES) | {"hidden_size": 20, "intermediate_size": 24}
    refused(tree, "no layer can compute in FP8", precision=ROWWISE, model={"init": odd})


@pytest.mark.parametrize(("capability", "match"), [((8, 0), r"has no FP8 \(found Some GPU, 8\.0"), ((9, 0), "rounded to bf")])
def test_a_cuda_device_is_asked_what_it_can(tree, monkeypatch, capability, match):
    from medtrain.trainer.config.settings import PrecisionConfig
    from medtrain.trainer.model.precision import plan_fp8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    shapes = {"model.layers.0.mlp.up_proj.weight": (32, 32)}
    with pytest.raises(InputError, match=match):
        plan_fp8(PrecisionConfig(fp8="tensorwise"), shapes, torch.device("cuda"), torch.float32)
    if capability == (9, 0):
        assert plan_fp8(PrecisionConfig(fp8="tensorwise"), shapes, torch.device("cuda"), torch.bfloat16).names == set(shapes)


def test_a_run_goes_on_with_other_checks_but_not_with_other_arithmetic(tree, tmp_path):
    run("cpt", watched(tree), tmp_path / "run")
    for name, value in [("fp8", "rowwise"), ("fp8_all_gather", True)]:
        with pytest.raises(InputError, match=rf"another run.*precision\.{name}"):
            run("cpt", watched(tree, **{name: value}), tmp_path / "run")
    run("cpt", watched(tree, fp8_check_every=3, fp8_guard="warn", fp8_tolerance=1.0), tmp_path / "run")
