"""Every configuration that is shipped is read without a mistake, says nothing that its stage ignores, and can be planned."""

import subprocess
from pathlib import Path

import pytest

from medtrain.trainer.config.exam import load_pairs_config
from medtrain.trainer.config.settings import load_config
from medtrain.trainer.plan.command import plan_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHIPPED = sorted(CONFIGS.glob("qwen2.5-*.yaml"))  # of named models; the others plan for whatever model they are given
TRAINING = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "pairs")


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.name)
def test_a_shipped_training_config_is_valid_and_every_setting_in_it_counts(path):
    config = load_config(None, path)
    assert config.stage in path.stem
    assert config.unused() == []


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.name)
def test_a_shipped_training_config_can_be_planned(path):
    sizes = None if path in SHIPPED else "qwen2.5-7b"
    assert plan_config(load_config(None, path), world_size=8, gpu_memory_gib=79, sizes=sizes)["peak_gib"] > 0


def test_the_plans_in_comments_and_in_the_docs_are_todays():
    doc = (CONFIGS.parent / "docs" / "plan.md").read_text(encoding="utf-8")
    assert len(SHIPPED) == 10
    for path in SHIPPED:
        config = load_config(None, path)
        peaks = [plan_config(config, world_size=ranks, gpu_memory_gib=79)["peak_gib"] for ranks in (8, 64, 128)]
        line = "# medtrain plan: {:.1f} GiB per GPU on 8 ranks, {:.1f} on 64, {:.1f} on 128\n".format(*peaks)
        assert line in path.read_text(encoding="utf-8"), f"{path.name} should say {line}"
        row = "| {} | {:.1f} | {:.1f} | {:.1f} |".format(path.stem, *peaks)
        assert row in doc, f"docs/plan.md should say {row}"


@pytest.mark.parametrize("stage", ["cpt", "rpo"])
def test_72b_trains_on_one_node_of_8_with_room_to_spare(stage):
    config = load_config(None, CONFIGS / f"qwen2.5-72b-{stage}-1node.yaml")
    assert not config.lora.on
    plan = plan_config(config, world_size=8, gpu_memory_gib=76)
    assert plan["fits"] and plan["model"]["trained"] == 72_706_203_648
    assert plan["largest_micro_batch_tokens"] >= plan["least_micro_batch_tokens"]


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh"])
def test_a_launch_script_parses_and_tells_its_usage(script):
    subprocess.run(["bash", "-n", CONFIGS / "launch" / script], check=True)
    done = subprocess.run(["bash", CONFIGS / "launch" / script], capture_output=True, text=True)
    assert done.returncode == 2 and "cpt|rpo CONFIG.yaml" in done.stderr


def test_the_launch_script_starts_torchrun_with_the_nodes_it_is_told(tmp_path):
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    where = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NODES": "8", "NODE_RANK": "3", "HEAD": "node0:29500"}
    command = ["bash", CONFIGS / "launch" / "torchrun.sh", "cpt", "c.yaml", "optim.lr=1"]
    done = subprocess.run(command, env=where, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert words[:8] == "--nnodes 8 --node-rank 3 --master-addr node0 --master-port 29500".split()
    assert words[-5:] == ["--no-python", "medtrain", "cpt", "c.yaml", "optim.lr=1"]


def test_the_shipped_pairs_config_is_valid():
    assert load_pairs_config(CONFIGS / "pairs.yaml").num_paths == 8
