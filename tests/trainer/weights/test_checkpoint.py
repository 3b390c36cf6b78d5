"""Checkpoints written in the background: of their own step, whole or absent, on any number of ranks; failures are told."""

import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_curve, documents, killed_in_a_child, read_metrics, run, run_on_ranks, without_timing
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh

from medtrain.trainer.config.settings import config_from_dict
from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import World
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.run.folder import RunFolder
from medtrain.trainer.train.cpt import CptData
from medtrain.trainer.train.optimizer import make_optimizer
from medtrain.trainer.weights import checkpoint
from medtrain.trainer.weights.checkpoint import Saver, complete_checkpoints, load_checkpoint
from medtrain.trainer.weights.load import init_weights


@pytest.fixture
def tree(cpt_tree):
    cpt_tree["checkpoint"] = {"every": 2, "keep": 5}
    return cpt_tree


def read(folder, tmp_path):
    """All tensors of a checkpoint, whole, by their path."""
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    found = {}

    def walk(node, path):
        if isinstance(node, dict | list | tuple):
            for key, item in node.items() if isinstance(node, dict) else enumerate(node):
                walk(item, f"{path}.{key}")
        else:
            found[path] = node

    walk(torch.load(tmp_path / "whole.pt", weights_only=False), "")
    return found


def assert_same_content(a, b, tmp_path):
    a, b = read(a, tmp_path), read(b, tmp_path)
    assert a.keys() == b.keys() and any(".exp_avg" in path for path in a)
    for path, value in a.items():
        assert torch.equal(value, b[path]) if isinstance(value, torch.Tensor) else value == b[path], path


PRECISIONS = {
    "float32": {},
    "8-bit moments": {"optim": {"state": "8bit"}, "hidden_size": 128},
    "bf16 weights": {"precision": {"compute": "bfloat16", "weights": "bf16"}},
    "lora": {"lora": {"rank": 2}},
    "tied": {"tie_word_embeddings": True},
    "fp8 all-gather": {
        "precision": {"fp8": "tensorwise", "fp8_emulate": True, "fp8_all_gather": True, "fp8_check_every": 0},
        "intermediate_size": 32,
    },
}


def _changed(tree, changes):
    for name, value in changes.items():
        if isinstance(value, dict):
            tree[name] = tree.get(name, {}) | value
        else:
            tree["model"]["init"][name] = value
    return tree


def _run_with_late_writes(tree, out):
    """Run so that nothing of a checkpoint is written before the row of the step after it is there."""
    write_data, append = FileSystemWriter.write_data, RunFolder.append_metrics
    trained_on = threading.Event()

    def appending(self, row):
        append(self, row)
        if row["step"] % 2 or row["step"] == tree["optim"]["steps"]:
            trained_on.set()

    def writing(self, plan, planner):
        if not dist.is_initialized() or dist.get_rank() == 0:
            assert trained_on.wait(timeout=120)
            trained_on.clear()
        return write_data(self, plan, planner)

    RunFolder.append_metrics, FileSystemWriter.write_data = appending, writing
    try:
        run("cpt", tree, out)
    finally:
        RunFolder.append_metrics, FileSystemWriter.write_data = append, write_data


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_checkpoint_holds_its_own_step_though_training_went_on(tree, tmp_path, name):
    if name in ("8-bit moments", "fp8 all-gather"):
        pytest.importorskip("torchao")
    tree = _changed(tree, PRECISIONS[name])
    run("cpt", tree, tmp_path / "at-once", checkpoint__async_save=False)
    _run_with_late_writes(tree, tmp_path / "late")
    for step in (2, 4, 6):
        folders = (tmp_path / f / "checkpoints" / f"step-{step:08d}" for f in ("at-once", "late"))
        assert_same_content(*folders, tmp_path)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "late")}
    assert [step for step, row in rows.items() if row.get("checkpoint_seconds", 0) > 0] == [2, 4, 6]


def test_on_two_ranks_too(tree, tmp_path):
    run_on_ranks(2, tmp_path, run, "cpt", _changed(tree, {"checkpoint": {"async_save": False}}), tmp_path / "at-once")
    run_on_ranks(2, tmp_path, _run_with_late_writes, _changed(tree, {"checkpoint": {"async_save": True}}), tmp_path / "late")
    for step in (2, 4, 6):
        folders = (tmp_path / f / "checkpoints" / f"step-{step:08d}" for f in ("at-once", "late"))
        assert_same_content(*folders, tmp_path)


def _saved_on_two_replicas(tree, root):
    """Two copies of the model on two ranks each, trained a step, saved in the background, loaded on one copy of four parts."""
    config = config_from_dict("cpt", tree)
    hf_config = load_model_config(config.model, load_tokenizer(config.model))
    policies, optimizers = [], []
    for shape, names in (((2, 2), ("replicate", "shard")), ((4,), ("shard",))):
        world = World(dist.get_rank(), 4, torch.device("cpu"), init_device_mesh("cpu", shape, mesh_dim_names=names))
        policy = build_model(config.model, hf_config, world, torch.float32, backend="sdpa")
        init_weights(policy, len(policies))
        policies.append(policy)
        optimizers.append(make_optimizer(policy, config))
    policies[0](windows_batch(documents())).sum().backward()
    optimizers[0].step()
    saver = Saver(root, world, keep=1, background=True)
    saver.begin(1, policies[0], optimizers[0], {})
    saver.commit()
    expected = [p.full_tensor() for p in policies[0].parameters()]
    saver.finish()
    saver.close()
    load_checkpoint(root / "step-00000001", policies[1], optimizers[1], world)
    for p, whole in zip(policies[1].parameters(), expected, strict=True):
        assert torch.equal(p.full_tensor(), whole)
    moments = [
        [optimizer.state[p]["exp_avg"].full_tensor() for p in policy.parameters()]
        for policy, optimizer in zip(policies, optimizers, strict=True)
    ]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*moments, strict=True))


def test_a_replicated_model_is_saved_once_and_loads_where_it_is_not_replicated(tree, tmp_path):
    run_on_ranks(4, tmp_path, _saved_on_two_replicas, tree, tmp_path / "checkpoints")


def _killed_in(name, tree, out):
    """Die as by SIGKILL in the writing thread, in what is named, once two checkpoints are complete."""
    place = FileSystemWriter if hasattr(FileSystemWriter, name) else checkpoint
    true = getattr(place, name)

    def dying(*args, **options):
        if len(complete_checkpoints(out / "checkpoints")) == (3 if name == "_remove" else 2):
            assert threading.current_thread() is not threading.main_thread()
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*args, **options)

    setattr(place, name, dying)
    run("cpt", tree, out)


@pytest.mark.parametrize(
    ("moment", "complete"), [("write_data", [2, 4]), ("finish", [2, 4]), ("write_json", [2, 4]), ("_remove", [2, 4, 6])]
)
def test_killed_while_writing_only_complete_checkpoints_are_left_and_every_bit_comes_again(tree, tmp_path, moment, complete):
    tree["optim"]["steps"] = 8
    tree["checkpoint"]["keep"] = 2
    run("cpt", tree, tmp_path / "whole")
    killed_in_a_child(_killed_in, moment, tree, tmp_path / "killed")
    root = tmp_path / "killed" / "checkpoints"
    assert [step for step, _ in complete_checkpoints(root)] == complete
    assert len(list(root.glob("*.partial"))) == (moment != "_remove")
    for _, folder in complete_checkpoints(root):
        assert FileSystemReader(folder).read_metadata().state_dict_metadata
    run("cpt", tree, tmp_path / "killed")
    assert without_timing(read_metrics(tmp_path / "whole")) == without_timing(read_metrics(tmp_path / "killed"))
    whole, killed = ((tmp_path / f / "model" / "model.safetensors").read_bytes() for f in ("whole", "killed"))
    assert whole == killed
    assert sorted(os.listdir(root)) == ["step-00000006", "step-00000008"]


def _disk_full(tree, out, rank, step):
    write_data = FileSystemWriter.write_data

    def writing(self, plan, planner):
        if f"step-{step:08d}" in str(self.path) and (not dist.is_initialized() or dist.get_rank() == rank):
            raise OSError(28, "No space left on device")
        return write_data(self, plan, planner)

    FileSystemWriter.write_data = writing
    try:
        with pytest.raises(RuntimeError, match=r"checkpoint of step \d was not written: .*No space left .*stands|before it"):
            run("cpt", tree, out)
    finally:
        FileSystemWriter.write_data = write_data


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(tree, tmp_path, step, background):
    tree["checkpoint"]["async_save"] = background
    _disk_full(tree, tmp_path / "run", 0, step)
    assert [s for s, _ in complete_checkpoints(tmp_path / "run" / "checkpoints")] == list(range(2, step, 2))
    assert read_metrics(tmp_path / "run")[-1]["step"] <= step + 2
    assert not (tmp_path / "run" / "model").exists()


def test_a_rank_that_cannot_write_ends_the_run_on_every_rank(tree, tmp_path):
    run_on_ranks(2, tmp_path, _disk_full, tree, tmp_path / "run", 1, 4)
    assert [s for s, _ in complete_checkpoints(tmp_path / "run" / "checkpoints")] == [2]


def _nothing_published(tree, out):
    def refusing(path, content):
        raise OSError(30, "Read-only file system")

    publish, checkpoint.write_json = checkpoint.write_json, refusing
    try:
        with pytest.raises(RuntimeError, match="checkpoint of step 2 was not written"):
            run("cpt", tree, out)
    finally:
        checkpoint.write_json = publish


def test_what_rank_0_fails_to_publish_is_an_error_on_every_rank(tree, tmp_path):
    run_on_ranks(2, tmp_path, _nothing_published, tree, tmp_path / "run")


def test_an_error_of_the_training_waits_for_the_checkpoint_under_way(tree, tmp_path, monkeypatch):
    from medtrain.trainer.train import loop

    write_data, true_step = FileSystemWriter.write_data, loop.optimizer_step
    failed = threading.Event()

    def failing(policy, data, loss, optimizer, step, *args, **options):
        if step == 2:
            failed.set()
            raise RuntimeError("planted")
        return true_step(policy, data, loss, optimizer, step, *args, **options)

    def writing(self, plan, planner):
        assert failed.wait(timeout=120)
        return write_data(self, plan, planner)

    monkeypatch.setattr(loop, "optimizer_step", failing)
    monkeypatch.setattr(FileSystemWriter, "write_data", writing)
    with pytest.raises(RuntimeError, match="planted"):
        run("cpt", tree, tmp_path / "run")
    assert [step for step, _ in complete_checkpoints(tmp_path / "run" / "checkpoints")] == [2]


def _noting_samples(stage, tree, out, samples, stop_after=None):
    """Run and note what each rank counted in each step; ask for a stop after step ``stop_after``."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    micro_batches, append = CptData.micro_batches, RunFolder.append_metrics

    def noting(self, step, world):
        batches, n = micro_batches(self, step, world)
        with open(samples / f"{step}-{world.size}-{rank}", "w") as file:
            for batch in batches:
                for start, end in zip(batch.target_cu_seqlens[:-1], batch.target_cu_seqlens[1:], strict=True):
                    file.write(" ".join(map(str, batch.targets[start:end].tolist())) + "\n")
        return batches, n

    def asking(self, row):
        append(self, row)
        if row["step"] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    CptData.micro_batches, RunFolder.append_metrics = noting, asking
    try:
        assert run(stage, tree, out).interrupted == (stop_after is not None)
    finally:
        CptData.micro_batches, RunFolder.append_metrics = micro_batches, append


def samples_of(folder):
    """By step: the sorted token sequences that count, all ranks together, and the number of ranks."""
    steps = {}
    for file in folder.iterdir():
        step, size, _ = map(int, file.name.split("-"))
        sequences, sizes = steps.setdefault(step, ([], set()))
        sequences += [line for line in file.read_text().splitlines() if line]
        sizes.add(size)
    return {step: (sorted(sequences), sizes) for step, (sequences, sizes) in steps.items()}


@pytest.mark.parametrize("stage", ["cpt", "rpo"])
def test_saved_on_two_ranks_it_goes_on_on_four_and_then_alone_with_the_same_samples(stage, request, tmp_path):
    tree = request.getfixturevalue(f"{stage}_tree")
    tree["checkpoint"] = {"every": 100}
    for name in ("whole-samples", "moved-samples"):
        (tmp_path / name).mkdir()
    _noting_samples(stage, tree, tmp_path / "whole", tmp_path / "whole-samples")
    arguments = (stage, tree, tmp_path / "moved", tmp_path / "moved-samples")
    run_on_ranks(2, tmp_path, _noting_samples, *arguments, 1)
    assert not (tmp_path / "moved" / "model").exists()
    run_on_ranks(4, tmp_path, _noting_samples, *arguments, 3)
    _noting_samples(*arguments)
    assert [start["world_size"] for start in RunFolder(tmp_path / "moved").starts()] == [2, 4, 1]
    assert_same_curve(tmp_path / "whole", tmp_path / "moved", tolerance=1e-5)
    if stage == "cpt":
        whole, moved = samples_of(tmp_path / "whole-samples"), samples_of(tmp_path / "moved-samples")
        assert [moved[step][1] for step in range(6)] == [{2}, {2}, {4}, {4}, {1}, {1}]
        assert all(moved[step][0] == whole[step][0] for step in range(6))
