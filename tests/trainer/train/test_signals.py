"""A signal that asks a run to stop, at any moment: nothing is lost, and the same command gives the same bits."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import read_metrics, run, run_on_ranks, without_timing
from safetensors.torch import load_file

from medtrain.trainer.exam import during
from medtrain.trainer.run.folder import RunFolder
from medtrain.trainer.train import cpt, heldout, reference


def _signal_once(monkeypatch, owner, name, call=1, rank=0):
    """Let ``owner.name`` send this process SIGTERM when it is called for the ``call``-th time."""
    original, calls = getattr(owner, name), 0

    def signalling(*args, **options):
        nonlocal calls
        calls += 1
        if calls == call and (not dist.is_initialized() or dist.get_rank() == rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, signalling)


def _tree(request, stage):
    tree = request.getfixturevalue(f"{stage}_tree")
    rows = tree["data"]["sources" if stage == "cpt" else "pairs"][0]["path"]
    tree["data"]["heldout"] = [{"path": rows, "name": "h"}]
    tree["eval"] = {"every": 3}
    tree["checkpoint"] = {"every": 100}
    return tree


def _weights(out):
    return {name: tensor.tolist() for name, tensor in load_file(Path(out) / "model" / "model.safetensors").items()}


MOMENTS = {
    "tokenising": ("cpt", cpt, "tokenize_source", 1),
    "reference": ("rpo", reference, "_micro_batch_logps", 2),
    "held-out before step 1": ("cpt", heldout, "cpt_batch", 2),
    "held-out at step 3": ("cpt", heldout.HeldoutText, "evaluate", 2),
    "held-out pairs at step 3": ("rpo", RunFolder, "append_metrics", 4),  # the row of step 3, after that of the start
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_stopped_at_any_moment_goes_on_to_the_same_bits(moment, request, tmp_path, monkeypatch, capsys):
    stage, owner, name, call = MOMENTS[moment]
    tree = _tree(request, stage)
    run(stage, tree, tmp_path / "whole")
    tree["data"]["cache"] = str(tmp_path / "another cache")
    with monkeypatch.context() as patch:
        _signal_once(patch, owner, name, call)
        stopped = run(stage, tree, tmp_path / "run")
    assert stopped.interrupted and not (tmp_path / "run" / "model").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if "step 3" in moment:
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert not run(stage, tree, tmp_path / "run").interrupted
    assert without_timing(read_metrics(tmp_path / "run")) == without_timing(read_metrics(tmp_path / "whole"))
    assert _weights(tmp_path / "run") == _weights(tmp_path / "whole")


def _stopped_on_one_rank(stage, tree, out):
    with pytest.MonkeyPatch.context() as patch:
        _signal_once(patch, heldout.HeldoutText, "evaluate", 2, rank=1)
        assert run(stage, tree, out).interrupted


def test_a_signal_to_one_rank_stops_the_evaluation_of_all(request, tmp_path):
    tree = _tree(request, "cpt")
    run_on_ranks(2, tmp_path, run, "cpt", tree, tmp_path / "whole")
    run_on_ranks(2, tmp_path, _stopped_on_one_rank, "cpt", tree, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    run_on_ranks(2, tmp_path, run, "cpt", tree, tmp_path / "run")
    assert without_timing(read_metrics(tmp_path / "run")) == without_timing(read_metrics(tmp_path / "whole"))
    assert _weights(tmp_path / "run") == _weights(tmp_path / "whole")


def test_an_exam_that_is_broken_off_is_taken_up_again(request, tmp_path, monkeypatch):
    tree = _tree(request, "rpo")
    rows = [
        {"problem_id": str(i), "problem_text": f"w{i}", "choices": ["a", "b"], "answer": ["a"], "points": "1"} for i in range(3)
    ]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"]["exam"] = str(tmp_path / "exam.jsonl")
    tree["data"]["heldout"] = []
    tree["eval"] = {"exam_every": 3, "exam_max_new_tokens": 4, "exam_max_answer_tokens": 3}
    run("rpo", tree, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _signal_once(patch, during, "_evaluate_mode", 3)  # two modes at the start; then that of step 3
        assert run("rpo", tree, tmp_path / "run").interrupted
    assert [path.name for path in (tmp_path / "run" / "exam").iterdir()] == ["step-00000000.jsonl"]
    run("rpo", tree, tmp_path / "run")
    assert without_timing(read_metrics(tmp_path / "run")) == without_timing(read_metrics(tmp_path / "whole"))
    assert _weights(tmp_path / "run") == _weights(tmp_path / "whole")
