"""Sharded checkpoints: written in the background, whole or absent, resumable on any number of ranks.

``checkpoints/step-00000010/`` holds torch.distributed.checkpoint files (trained weights and optimizer state, each rank's
own shards; frozen weights stay where they came from) and ``trainer.json``. It is written under a name ending in
``.partial`` and renamed when every rank has written, so a folder without that ending is complete.

Training is held up while each rank copies its shards to host memory; a thread of each rank then writes the copy. The threads
talk over a gloo group of their own, for two threads of a rank must not use one group.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from medtrain.trainer.distributed import TIMEOUT, World, local_tensor, unwrapped
from medtrain.trainer.errors import bad_input
from medtrain.trainer.files import PARTIAL, complete_checkpoints, sync, write_json
from medtrain.trainer.model.policy import PolicyModel

log = logging.getLogger(__name__)

# torch warns in every run of one process, where it is right and nothing is wrong.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# Loading is strict: it fails where the checkpoint lacks what the model trains.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class Saver:
    """Writes the checkpoints of one run under ``root`` and keeps the newest ``keep``; all ranks make the same calls.

    ``begin`` takes what is to be saved, ``commit`` lets it become a checkpoint; training may go on at once. One that was
    not written is an error of the next ``begin`` or ``finish``, on every rank; ``failed`` tells it earlier.

    ``background``: copy to host memory and write from there in a thread; else write in ``begin``. The host memory (this
    rank's shards of trained weights and optimizer state, pinned on a GPU machine) is kept for the next checkpoint.
    """

    def __init__(self, root: Path, world: World, *, keep: int, background: bool):
        self.root, self.world, self.keep = root, world, keep
        self._group: Any = None  # a process group, on several ranks
        self._thread: ThreadPoolExecutor | None = None
        if background:
            if world.size > 1:
                self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            # A thread begins on GPU 0, and whatever touches CUDA there would take memory from that GPU's own rank.
            prepare = torch.cuda.set_device if world.device.type == "cuda" else lambda device: None
            self._thread = ThreadPoolExecutor(1, "checkpoint", prepare, (world.device,))
        self._copy: Any = None  # host memory in the form of what is saved
        self._pinned: list[torch.Tensor] = []  # its tensors that a GPU copies to by itself
        self._begun: Any = None  # (step, tree of tensors, state)
        self._pending: tuple[int, Future] | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows already that the last checkpoint was not written."""
        return self._pending is not None and self._pending[1].done() and self._pending[1].exception() is not None

    def begin(self, step: int, policy: PolicyModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> float:
        """Take ``policy`` and ``optimizer`` as they are now; returns the seconds that training was held up. Waits for the
        checkpoint before this one.

        Raises RuntimeError: that one was not written; without ``background``, this one.
        """
        started = time.perf_counter()
        self.finish()
        if self.world.is_main:
            for leftover in self.root.glob(f"step-*{PARTIAL}"):  # of a run that was killed while saving
                shutil.rmtree(leftover)
            _partial(self.root, step).mkdir(parents=True)
        self.world.barrier()
        tree = _trained_state(policy, optimizer)
        on_gpu = self.world.device.type == "cuda"
        if self._thread is None:
            try:
                self._write(step, tree)
            except (CheckpointException, OSError, RuntimeError) as error:
                raise _not_written(step, error, self.root) from error
        else:
            self._copy = tree = _copied(tree, self._copy, self._pin if on_gpu else None)
            if on_gpu:
                torch.cuda.current_stream().synchronize()
        self._begun = step, tree, {"step": step, **state}
        return time.perf_counter() - started

    def commit(self) -> None:
        """Let what ``begin`` took become a checkpoint: whatever must be on disk before it must be there by now."""
        (step, tree, state), self._begun = self._begun, None
        if self._thread is None:
            self._publish(step, state)
            self.world.barrier()
            return

        def write_and_publish() -> None:
            self._write(step, tree)
            self._publish(step, state)

        self._pending = step, self._thread.submit(write_and_publish)

    def finish(self) -> None:
        """Wait until the last checkpoint is written.

        Raises RuntimeError: it was not, on this rank or another.
        """
        pending, self._pending = self._pending, None
        step, error = (pending[0], pending[1].exception()) if pending is not None else (0, None)
        if self.world.sum(torch.tensor([float(error is not None)], dtype=torch.float64))[0] > 0:
            raise _not_written(step, error, self.root) from error

    def close(self) -> None:
        """Wait for this rank's thread, also after an error elsewhere; a failure that nothing else has reported is logged."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        cudart: Any = torch.cuda.cudart() if self._pinned else None
        for memory in self._pinned:
            cudart.cudaHostUnregister(memory.data_ptr())
        self._pinned, self._copy = [], None
        if self._pending is not None and self.failed:
            step, future = self._pending
            log.warning(f"{_not_written(step, future.exception(), self.root)}")

    def _pin(self, memory: torch.Tensor) -> None:
        """Not torch's own pinned memory: its blocks, one per tensor, are rounded up to powers of two."""
        num_bytes = memory.numel() * memory.element_size()
        if not num_bytes:
            return
        cudart: Any = torch.cuda.cudart()  # typed as a module that may be missing
        if error := int(cudart.cudaHostRegister(memory.data_ptr(), num_bytes, 0)):
            raise RuntimeError(
                f"CUDA error {error}: no more host memory can be pinned for the copy of a checkpoint; "
                "checkpoint.async_save=false needs none"
            )
        self._pinned.append(memory)

    def _write(self, step: int, tree: dict) -> None:
        """Returns, or raises, on every rank when all have written."""
        writer = FileSystemWriter(_partial(self.root, step), single_file_per_rank=True, sync_files=True)
        state_dict_saver.save(tree, storage_writer=writer, process_group=self._group, no_dist=self.world.size == 1)

    def _publish(self, step: int, state: dict) -> None:
        if not self.world.is_main:
            return
        partial = _partial(self.root, step)
        final = partial.with_suffix("")
        write_json(partial / "trainer.json", state)
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync(self.root)
        for _, old in complete_checkpoints(self.root)[: -self.keep]:
            _remove(old)


def load_checkpoint(folder: Path, policy: PolicyModel, optimizer: torch.optim.Optimizer | None, world: World) -> dict[str, Any]:
    """Fill what ``policy`` trains (and ``optimizer``) from a complete checkpoint, each rank its own shards; returns its state.
    InputError for a damaged one."""
    tree = _trained_state(policy, optimizer)
    try:
        state_dict_loader.load(tree, storage_reader=FileSystemReader(folder), no_dist=world.size == 1)
        state = json.loads((folder / "trainer.json").read_text())
    except (CheckpointException, OSError, ValueError, RuntimeError) as error:
        found, expected = _last_line(error), "remove this folder to go on from the one before"
        raise bad_input("damaged checkpoint", file=folder, found=found, expected=expected) from None
    set_state_dict(
        policy,
        [] if optimizer is None else optimizer,
        model_state_dict=tree["model"],
        optim_state_dict=tree.get("optim", {}),
        options=_TRAINED,
    )
    return state


def _trained_state(policy: PolicyModel, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Trained weights, as plain tensors so that a checkpoint can be read without torchao, and optimizer state."""
    policy.reshard_all()
    weights, moments = get_state_dict(policy, [] if optimizer is None else optimizer, options=_TRAINED)
    tree: dict[str, Any] = {"model": {name: unwrapped(cast(torch.Tensor, weight)) for name, weight in weights.items()}}
    return tree if optimizer is None else tree | {"optim": moments}


@torch.no_grad()
def _copied(value: Any, memory: Any, pin: Callable[[torch.Tensor], None] | None) -> Any:
    """A copy of nested ``value``, of DTensors this rank's part, in host memory: in ``memory``, an earlier copy, where given.
    From a GPU the copies are done when its current stream is."""
    if isinstance(value, torch.Tensor):
        if memory is None:
            memory = torch.empty_like(value, device="cpu")
            if pin is not None:
                pin(local_tensor(memory))
        local_tensor(memory).copy_(local_tensor(value), non_blocking=True)
        return memory
    if isinstance(value, dict):
        return {key: _copied(item, None if memory is None else memory[key], pin) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item, None if memory is None else memory[i], pin) for i, item in enumerate(value)]
    return copy.deepcopy(value)


def _last_line(error: BaseException) -> str:
    """A CheckpointException's text has many lines, a traceback for each rank; the last says what was wrong."""
    return str(error).strip().split("\n")[-1] or type(error).__name__


def _not_written(step: int, error: BaseException | None, root: Path) -> RuntimeError:
    cause = _last_line(error) if error is not None else "rank 0 failed"
    complete = complete_checkpoints(root)
    stands = f"{complete[-1][1]} stands" if complete else "there is none before it"
    return RuntimeError(f"the checkpoint of step {step} was not written: {cause}; {stands}")


def _partial(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}{PARTIAL}"


def _remove(folder: Path) -> None:
    """Remove a checkpoint, which must not be taken for a complete one when this is interrupted."""
    condemned = folder.with_name(folder.name + ".old" + PARTIAL)
    folder.rename(condemned)
    shutil.rmtree(condemned)
