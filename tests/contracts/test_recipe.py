"""What we rely on of all of them together: one run of each kind, on two ranks, from text to a folder that transformers
reads, in the versions that are installed here."""

import copy
import json
import math

import pytest
import torch
from helpers import EXAM_STYLE, SIZES, assert_same_curve, read_metrics, run, run_on_ranks, stopped_after, write_jsonl
from transformers import AutoModelForCausalLM

from medtrain.trainer.run.export import export_run

WIDE = SIZES | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def base(cpt_tree, tmp_path):
    """A folder that CPT left, 20 steps long, with an exam on the way."""
    rows = [
        {"problem_id": str(i), "problem_text": text, "choices": ["熱", "咳"], "answer": ["a"], "points": "1"}
        for i, text in enumerate(["熱 の 薬 は", "咳 は", "病 は"])
    ]
    (tmp_path / "style.yaml").write_text(json.dumps(EXAM_STYLE))
    cpt_tree["model"]["init"] = dict(WIDE)
    cpt_tree["optim"] |= {"steps": 4, "lr": 2e-3}
    cpt_tree["data"]["exam"] = str(write_jsonl(tmp_path / "exam.jsonl", rows))
    cpt_tree["eval"] = {"exam_prompt": str(tmp_path / "style.yaml"), "exam_max_new_tokens": 9, "exam_max_answer_tokens": 3}
    run_on_ranks(2, tmp_path, run, "cpt", cpt_tree, tmp_path / "cpt")
    return tmp_path / "cpt"


KINDS = {
    "full": {"optim": {"state": "8bit"}},
    "lora": {"lora": {"rank": 4}},
    "qlora": {"lora": {"rank": 4, "base": "nf4"}},
    "fp8": {"precision": {"fp8": "tensorwise", "fp8_emulate": True, "fp8_all_gather": True}},
}


def test_cpt_then_rpo_of_every_kind_and_an_export_that_loads(base, rpo_tree, tmp_path):
    last = read_metrics(base)[-1]
    assert {"loss", "exam/explanation_gap"} <= last.keys() and "exam/invalid" not in last
    rpo_tree["model"] = {"path": str(base / "model")}
    rpo_tree["optim"] |= {"steps": 3, "lr": 1e-3}
    for kind, changes in KINDS.items():
        tree, out = copy.deepcopy(rpo_tree), tmp_path / kind
        for section, values in changes.items():
            tree[section] = tree.get(section, {}) | values
        run_on_ranks(2, tmp_path, run, "rpo", tree, out)
        rows = [row for row in read_metrics(out) if "loss" in row]
        # The reference is that of the model without FP8.
        assert rows[0]["rewards/margin"] == pytest.approx(0, abs=0.3 if kind == "fp8" else 1e-3), kind
        assert math.isfinite(rows[-1]["loss"]), kind
        model = AutoModelForCausalLM.from_pretrained(out / "model")
        assert torch.isfinite(model(torch.tensor([[3, 5, 7]])).logits).all(), kind
        again = export_run(out, tmp_path / f"{kind}-again")
        assert (again / "model.safetensors").read_bytes() == (out / "model" / "model.safetensors").read_bytes(), kind


def test_a_checkpoint_of_two_ranks_goes_on_alone(cpt_tree, tmp_path):
    run("cpt", cpt_tree, tmp_path / "whole")
    run_on_ranks(2, tmp_path, stopped_after, 3, "cpt", cpt_tree, tmp_path / "stopped")
    run("cpt", cpt_tree, tmp_path / "stopped")
    assert_same_curve(tmp_path / "whole", tmp_path / "stopped")
