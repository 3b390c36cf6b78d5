"""Training runs: the same curve at any world size, batch and interruption; what is exported is what was trained."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from helpers import assert_same_curve, kill_in_a_child, read_metrics, run, run_on_ranks, without_timing
from transformers import AutoModelForCausalLM

from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.errors import InputError
from medtrain.trainer.train import record, step


def tree_of(stage, request):
    return request.getfixturevalue(f"{stage}_tree")


@pytest.mark.parametrize("stage", ["cpt", "rpo"])
@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_give_the_curve_and_weights_of_one_process(stage, tied, request, tmp_path):
    tree = tree_of(stage, request)
    tree["model"]["init"]["tie_word_embeddings"] = tied
    tree["data"]["heldout"] = [{"path": tree["data"]["sources" if stage == "cpt" else "pairs"][0]["path"], "name": "h"}]
    tree["optim"]["steps"] = 10
    run(stage, tree, tmp_path / "one")
    run_on_ranks(2, tmp_path, run, stage, tree, tmp_path / "two")
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / f / "model").state_dict() for f in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("stage", ["cpt", "rpo"])
def test_the_micro_batch_budget_changes_nothing_but_rounding(stage, request, tmp_path):
    tree = tree_of(stage, request)
    for budget in (64, 128, 4096):
        run(stage, tree, tmp_path / str(budget), optim__micro_batch_tokens=budget)
    assert_same_curve(tmp_path / "64", tmp_path / "4096")
    assert_same_curve(tmp_path / "128", tmp_path / "4096")


def test_three_ranks_with_less_work_than_ranks_still_agree(rpo_tree, tmp_path):
    rpo_tree["optim"]["batch_pairs"] = 2
    run("rpo", rpo_tree, tmp_path / "one")
    run_on_ranks(3, tmp_path, run, "rpo", rpo_tree, tmp_path / "three")
    assert_same_curve(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize(("stage", "at_step"), [("cpt", 1), ("cpt", 5), ("rpo", 3)])
def test_a_killed_run_started_again_repeats_every_bit(stage, at_step, request, tmp_path):
    tree = tree_of(stage, request)
    tree["optim"]["steps"] = 8
    tree["checkpoint"] = {"every": 2, "keep": 1}
    rows = tree["data"]["sources" if stage == "cpt" else "pairs"][0]["path"]
    tree |= {"data": tree["data"] | {"heldout": [{"path": rows, "name": "held"}]}, "eval": {"every": 3}}
    run(stage, tree, tmp_path / "whole")
    kill_in_a_child(stage, tree, tmp_path / "killed", at_step)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a row half written when the power went
    run(stage, tree, tmp_path / "killed")
    assert without_timing(read_metrics(tmp_path / "whole")) == without_timing(read_metrics(tmp_path / "killed"))
    whole, killed = ((tmp_path / f / "model" / "model.safetensors").read_bytes() for f in ("whole", "killed"))
    assert whole == killed


def test_a_checkpoint_half_written_is_never_taken_for_one(cpt_tree, tmp_path):
    run("cpt", cpt_tree, tmp_path / "whole")
    cpt_tree["checkpoint"] = {"every": 2, "keep": 5}
    kill_in_a_child("cpt", cpt_tree, tmp_path / "killed", 6)
    last = tmp_path / "killed" / "checkpoints" / "step-00000004"
    last.rename(last.with_name(last.name + ".partial"))
    run("cpt", cpt_tree, tmp_path / "killed")
    assert without_timing(read_metrics(tmp_path / "whole")) == without_timing(read_metrics(tmp_path / "killed"))


def test_the_export_gives_the_logits_of_the_trained_model(cpt_tree, tmp_path):
    result = run("cpt", cpt_tree, tmp_path / "run", data__heldout=[{"path": cpt_tree["data"]["sources"][0]["path"]}])
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    tokenizer = read_tokenizer(result.model_dir)
    nats = num_bytes = 0.0
    with open(cpt_tree["data"]["sources"][0]["path"], encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            ids = torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
            # Windows of seq_len inputs: a later window of a long document does not see the one before.
            for start in range(0, len(ids) - 1, 32):
                part = ids[start : start + 33]
                logps = model(part[:-1].unsqueeze(0)).logits[0].detach().double().log_softmax(-1)
                nats -= float(logps.gather(1, part[1:, None]).sum())
            num_bytes += len(text.encode())
    logged = result.metrics["heldout/corpus/bits_per_byte"]
    assert logged == pytest.approx(nats / torch.log(torch.tensor(2.0)).item() / num_bytes, rel=1e-6)


def test_training_learns(cpt_tree, rpo_tree, tmp_path):
    cpt = run("cpt", cpt_tree, tmp_path / "c", optim__steps=60)
    losses = [row["loss"] for row in read_metrics(cpt.run_dir)]
    assert losses[-1] < losses[0] - 0.2
    del rpo_tree["model"]["init"], rpo_tree["model"]["tokenizer"]
    rpo_tree["model"]["path"] = str(cpt.model_dir)
    rpo = run("rpo", rpo_tree, tmp_path / "r", optim__steps=30, optim__lr=3e-3)
    first, last = (read_metrics(rpo.run_dir)[i] for i in (0, -1))
    assert first["dpo_loss"] == pytest.approx(0.693147, abs=1e-4)  # policy == reference: ln 2
    assert abs(first["rewards/margin"]) < 1e-3
    assert last["rewards/margin"] > 0.5 and last["rewards/accuracy"] == 1.0
    assert last["nll_loss"] < first["nll_loss"]


def test_the_step_zero_reference_is_stored_and_used_again(rpo_tree, tmp_path, monkeypatch):
    run("rpo", rpo_tree, tmp_path / "run", optim__steps=2)
    parts = list((tmp_path / "run" / "reference").glob("*/part-*.npy"))
    assert parts
    stamps = [part.stat().st_mtime_ns for part in parts]
    (tmp_path / "run" / "model").rename(tmp_path / "gone")
    run("rpo", rpo_tree, tmp_path / "run", optim__steps=2)
    assert [part.stat().st_mtime_ns for part in parts] == stamps


def test_a_reference_of_other_weights_stops_the_run(rpo_tree, tmp_path):
    import numpy as np

    run("rpo", rpo_tree, tmp_path / "run", optim__steps=2)
    (part,) = (tmp_path / "run" / "reference").glob("*/part-*.npy")
    np.save(part, np.load(part) + 0.5)
    (tmp_path / "run" / "model").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="not those of the starting weights"):
        run("rpo", rpo_tree, tmp_path / "run", optim__steps=2)


def test_sft_is_the_nll_term_alone(rpo_tree, tmp_path):
    result = run("rpo", rpo_tree, tmp_path / "run", rpo__loss="sft")
    for row in read_metrics(result.run_dir):
        assert row["loss"] == pytest.approx(row["nll_loss"], rel=1e-6)


LOSSES = [
    {"loss": "ipo"},
    {"loss": "hinge"},
    {"loss": "simpo", "beta": 2.0},
    {"loss": "robust", "label_smoothing": 0.1},
    {"nll_norm": "token"},
    {"alpha": 0.0},
]


@pytest.mark.parametrize("settings", LOSSES)
def test_every_loss_trains_and_two_budgets_agree(rpo_tree, tmp_path, settings):
    rpo_tree["rpo"] |= settings
    run("rpo", rpo_tree, tmp_path / "a", optim__steps=3)
    run("rpo", rpo_tree, tmp_path / "b", optim__steps=3, optim__micro_batch_tokens=64)
    assert_same_curve(tmp_path / "a", tmp_path / "b")


def test_a_folder_of_another_run_or_of_something_else_is_refused_untouched(cpt_tree, tmp_path):
    run("cpt", cpt_tree, tmp_path / "run")
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(InputError, match=r"another run.*optim\.lr"):
        run("cpt", cpt_tree, tmp_path / "run", optim__lr=0.5)
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(InputError, match="not empty"):
        run("cpt", cpt_tree, tmp_path / "other")
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]


def test_a_run_goes_on_where_its_input_has_moved_but_not_where_it_has_changed(cpt_tree, tmp_path):
    cpt_tree["checkpoint"] = {"every": 2}
    run("cpt", cpt_tree, tmp_path / "whole")
    kill_in_a_child("cpt", cpt_tree, tmp_path / "moved", 3)
    elsewhere = tmp_path / "elsewhere.jsonl"
    text = Path(cpt_tree["data"]["sources"][0]["path"]).read_text(encoding="utf-8")
    elsewhere.write_text(text + '{"text": "熱"}\n', encoding="utf-8")
    cpt_tree["data"]["sources"][0] = {"path": str(elsewhere), "name": None}
    with pytest.raises(InputError, match=r"other input.*data\.sources\.0 has changed"):
        run("cpt", cpt_tree, tmp_path / "moved")
    elsewhere.write_text(text, encoding="utf-8")
    run("cpt", cpt_tree, tmp_path / "moved")
    assert without_timing(read_metrics(tmp_path / "whole")) == without_timing(read_metrics(tmp_path / "moved"))
    with pytest.raises(InputError, match="precision has changed"):
        run("cpt", cpt_tree, tmp_path / "moved", precision__compute="bfloat16")


def test_a_removal_cut_short_leaves_no_checkpoint_that_looks_complete(cpt_tree, tmp_path, monkeypatch):
    import medtrain.trainer.weights.checkpoint as checkpoint

    run("cpt", cpt_tree, tmp_path / "whole", checkpoint__every=2)
    remove = checkpoint.shutil.rmtree

    def dying(folder, **options):
        if Path(folder).parent.name == "checkpoints":
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", dying)
    with pytest.raises(RuntimeError, match="checkpoint of step 4 was not written: KeyboardInterrupt"):
        run("cpt", cpt_tree, tmp_path / "cut", checkpoint__every=2, checkpoint__keep=1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", remove)
    found = checkpoint.complete_checkpoints(tmp_path / "cut" / "checkpoints")
    assert [step for step, _ in found] == [4]
    run("cpt", cpt_tree, tmp_path / "cut", checkpoint__every=2, checkpoint__keep=1)
    assert without_timing(read_metrics(tmp_path / "whole")) == without_timing(read_metrics(tmp_path / "cut"))


def _own_folders(tree, folders):
    rank = torch.distributed.get_rank()
    with pytest.raises(InputError, match="all nodes share"):
        run("cpt", tree, folders / str(rank))


def test_ranks_that_do_not_see_one_run_folder_stop_at_once(cpt_tree, tmp_path):
    run_on_ranks(2, tmp_path, _own_folders, cpt_tree, tmp_path / "folders")


def _bad_row(tree, out):
    with pytest.raises(InputError, match="row 41.*not valid JSON"):
        run("cpt", tree, out)


def test_a_mistake_that_rank_0_finds_is_raised_on_every_rank(cpt_tree, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(cpt_tree["data"]["sources"][0]["path"]).read_text(encoding="utf-8") + "{", encoding="utf-8")
    cpt_tree["data"]["sources"][0]["path"] = str(broken)
    run_on_ranks(2, tmp_path, _bad_row, cpt_tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_before_the_update(cpt_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "_clip", lambda policy, limit: float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        run("cpt", cpt_tree, tmp_path / "run")


def test_epochs_are_counted_into_steps(rpo_tree, tmp_path):
    del rpo_tree["optim"]["steps"]
    run("rpo", rpo_tree, tmp_path / "run", optim__epochs=1.5)
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 5 and sum(row["pairs"] for row in rows) == 40  # 24 pairs, 8 a step: 4.5 -> 5 steps


def test_bfloat16_compute_follows_float32(cpt_tree, tmp_path):
    run("cpt", cpt_tree, tmp_path / "f32", optim__steps=10)
    run("cpt", cpt_tree, tmp_path / "bf16", optim__steps=10, precision__compute="bfloat16")
    for a, b in zip(read_metrics(tmp_path / "f32"), read_metrics(tmp_path / "bf16"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2) and a["loss"] != b["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16" / "model")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(("system", "unit"), [("linux", 2**20), ("darwin", 2**30)])  # KiB, and bytes
def test_peak_memory_is_in_gib_on_every_system(monkeypatch, system, unit):
    monkeypatch.setattr("sys.platform", system)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    assert record._max_memory_gib(torch.device("cpu")) == pytest.approx(peak, rel=0.2)
