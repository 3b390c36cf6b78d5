"""One process or many: who this process is, and the few collectives the trainer needs.

Alone there is no process group. Under torchrun there is one (gloo on CPU, NCCL on GPU). The rest of the trainer asks
:class:`World` and never looks at the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    """Attributes: ``rank`` and ``size`` over all nodes; ``device`` this process computes on; ``mesh`` (1-D, all
    ranks) where there is a process group, else None."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a float64 vector, on the CPU; the same bits on every rank."""
        if self.size == 1:
            return values.cpu()
        on_device = values.to(self.device)
        dist.all_reduce(on_device)
        return on_device.cpu()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the body first (it fills caches), the others after it (they find them filled)."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


@contextmanager
def join_world(*, needs_group: bool = False) -> Iterator[World]:
    """Join torchrun's process group if there is one, and leave it in good order.

    Args:
        needs_group: make a group of one process where torchrun made none (FSDP's mixed precision needs a mesh).
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    mesh = None
    already_in_group = dist.is_initialized()
    if launched or needs_group or already_in_group:
        if not already_in_group:
            # Long, since rank 0 tokenises and hashes files while the others wait.
            options = {"timeout": timedelta(hours=2)}
            backend = "nccl" if device.type == "cuda" else "gloo"
            if device.type == "cuda":
                options["device_id"] = device
            if launched:
                dist.init_process_group(backend, **options)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
        rank, size = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    try:
        yield World(rank, size, device, mesh)
        if size > 1 and not already_in_group:
            dist.barrier()
    finally:
        if mesh is not None and not already_in_group:
            dist.destroy_process_group()
