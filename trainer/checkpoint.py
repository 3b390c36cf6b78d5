"""Sharded checkpoints: saved by all ranks, whole or absent, resumable on any number of ranks.

``checkpoints/step-00000010/`` holds torch.distributed.checkpoint files (trained weights and optimizer state, each rank's
own shards; frozen weights stay where they came from) and ``trainer.json``. It is written under a name ending in
``.partial`` and renamed when every rank has written, so a folder without that ending is complete.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from medtrain.trainer.distributed import World, unwrapped
from medtrain.trainer.errors import bad_input
from medtrain.trainer.files import PARTIAL, sync_folder, write_json
from medtrain.trainer.model import PolicyModel

# What torch says of a run of one process, where it is right and nothing is wrong.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


# Strictness is dcp.load's: it fails where the checkpoint lacks what the model trains.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def complete_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints under ``root``, oldest first."""
    if not root.is_dir():
        return []
    found = []
    for folder in root.glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdigit() and (folder / "trainer.json").is_file():
            found.append((int(number), folder))
    return sorted(found)


def save_checkpoint(
    root: Path,
    step: int,
    policy: PolicyModel,
    optimizer: torch.optim.Optimizer,
    state: dict,
    world: World,
    *,
    keep: int,
) -> Path:
    """Write ``step-STEP`` under ``root`` and remove all but the newest ``keep``; all ranks must call this."""
    final = step_folder(root, step)
    partial = final.with_name(final.name + PARTIAL)
    if world.is_main:
        for leftover in root.glob(f"step-*{PARTIAL}"):  # of a run that was killed while saving
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    world.barrier()
    policy.reshard_all()
    weights, moments = get_state_dict(policy, optimizer, options=_TRAINED)
    dcp.save(
        {"model": _unwrapped(weights), "optim": moments},
        storage_writer=FileSystemWriter(partial, single_file_per_rank=True, sync_files=True),
        no_dist=world.size == 1,
    )
    if world.is_main:
        write_json(partial / "trainer.json", {"step": step, **state})
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync_folder(root)
        for _, old in complete_checkpoints(root)[:-keep]:
            _remove(old)
    world.barrier()
    return final


def load_checkpoint(folder: Path, policy: PolicyModel, optimizer: torch.optim.Optimizer | None, world: World) -> dict:
    """Fill what ``policy`` trains (and ``optimizer``) from a complete checkpoint, each rank its own shards; returns its state.

    Raises:
        InputError: a damaged checkpoint.
    """
    policy.reshard_all()
    weights, moments = get_state_dict(policy, optimizer if optimizer is not None else [], options=_TRAINED)
    tree = {"model": _unwrapped(weights)} | ({"optim": moments} if optimizer is not None else {})
    try:
        dcp.load(tree, storage_reader=FileSystemReader(folder), no_dist=world.size == 1)
        state = json.loads((folder / "trainer.json").read_text())
    except (CheckpointException, OSError, ValueError, RuntimeError) as error:
        # CheckpointException is a BaseException and its text has many lines.
        raise bad_input("damaged checkpoint", file=folder, found=str(error).strip().split("\n")[-1],
                        expected="remove this folder to go on from the one before") from None  # fmt: skip
    set_state_dict(
        policy,
        optimizer if optimizer is not None else [],
        model_state_dict=tree["model"],
        optim_state_dict=tree.get("optim", {}),
        options=_TRAINED,
    )
    return state


def _unwrapped(weights: dict) -> dict:
    """Plain tensors, so that a checkpoint can be read without torchao."""
    return {name: unwrapped(weight) for name, weight in weights.items()}


def _remove(folder: Path) -> None:
    """Remove a checkpoint that must not be taken for a complete one when this is interrupted."""
    condemned = folder.with_name(folder.name + ".old" + PARTIAL)
    folder.rename(condemned)
    shutil.rmtree(condemned)
