"""One process or many: who this process is, and the few collectives the trainer needs.

Alone there is no process group, under torchrun there is one (gloo on CPU, NCCL on GPU). The rest of the trainer asks
:class:`World` and never reads the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from medtrain.trainer.errors import InputError, StopRequested, bad_input

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)  # of collectives; long, since rank 0 tokenises and hashes files while the others wait


@dataclass
class StopFlag:
    """Set by the handler of a signal. While ``interruptible``, the handler raises :class:`StopRequested` itself."""

    requested: bool = False
    interruptible: bool = False


@dataclass(frozen=True)
class World:
    """The ranks and what they do together; but for the properties, all ranks must make the same calls.

    Attributes: ``rank`` and ``size`` over all nodes; ``device`` this process computes on; ``mesh`` over all ranks where
    there is a process group, else None: ("shard",), or ("replicate", "shard") where the model has several copies; ``stop``:
    whether a stop of this process was requested.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    stop: StopFlag = field(default_factory=StopFlag, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Copies of the sharded model."""
        return 1 if self.mesh is None or self.mesh.ndim == 1 else self.mesh.size(0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """float64 [N] on any device -> its sum over all ranks, float64 [N] on the CPU; the same bits on every rank."""
        if self.size == 1:
            return values.cpu()
        on_device = values.to(self.device)
        dist.all_reduce(on_device)
        return on_device.cpu()

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, on every rank. Rank 0 alone reads, hashes and inspects; its InputError, or the
        StopRequested of a signal in the middle of it, is raised on every rank, so that none waits for one that has given up."""
        if self.size == 1:
            return self._interruptible(make)
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = self._interruptible(make)
            except (InputError, StopRequested) as error:
                box[1] = type(error), str(error)
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            kind, message = box[1]
            raise kind(message)
        return box[0]

    def _interruptible(self, make: Callable[[], T]) -> T:
        if self.stop.requested:
            raise StopRequested
        self.stop.interruptible = True
        try:
            return make()
        finally:
            self.stop.interruptible = False

    def raise_if_stopping(self) -> None:
        """Raise :class:`StopRequested` on every rank if a stop was requested on any."""
        if self.sum(torch.tensor([float(self.stop.requested)], dtype=torch.float64))[0] > 0:
            raise StopRequested

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in the order of the ranks, on every rank; for small objects that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def local_part(param: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """This rank's storage of a parameter, and which part of the whole tensor it holds: one slice per dim."""
    if not isinstance(param, DTensor):
        return param.data, tuple(slice(0, n) for n in param.shape)
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return param.to_local().data, tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(param: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a parameter, on every rank; all ranks must call this."""
    return unwrapped(param.full_tensor() if isinstance(param, DTensor) else param.data)


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or DTensor of one, without the wrapper that torchao puts around weights gathered in FP8; same storage."""
    if not isinstance(tensor, DTensor):
        return getattr(tensor, "_tensor", tensor)
    local = tensor.to_local()
    inner: torch.Tensor = getattr(local, "_tensor", local)
    if inner is local:
        return tensor
    return DTensor.from_local(
        inner, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def local_size() -> int:
    """How many ranks torchrun has started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def join_world(*, needs_group: bool = False, device_type: str | None = None, replicate: int = 1) -> Iterator[World]:
    """Join torchrun's process group if there is one, and leave it in good order.

    ``needs_group``: make a group of one process where torchrun made none (FSDP's mixed precision needs a mesh).
    ``device_type``: ``cpu`` or ``cuda``; by default a GPU where there is one.
    ``replicate``: copies of the model; ranks that share one are neighbours, so that one lies within a node where it fits.

    Raises InputError: the copies do not divide the ranks.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    on_gpu = device_type != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    already_in_group = dist.is_initialized()
    in_group = launched or needs_group or already_in_group
    if in_group and not already_in_group:
        # torch exports HashStore without saying so.
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # pyright: ignore[reportPrivateImportUsage]
        backend, device_id = ("nccl", device) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id, **({} if launched else alone))
    rank, size = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
    ended_well = False
    try:
        if size % replicate:
            expected = f"a divisor of {size}, the number of ranks"
            raise bad_input("does not divide the ranks", field="parallel.replicate", found=replicate, expected=expected)
        mesh = None
        if replicate > 1:
            mesh = init_device_mesh(device.type, (replicate, size // replicate), mesh_dim_names=("replicate", "shard"))
        elif in_group:
            mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        yield World(rank, size, device, mesh)
        if size > 1 and not already_in_group:
            dist.barrier()
        ended_well = True
    finally:
        # After an error the others may wait in a collective; leaving the group in good order would wait for them.
        if in_group and not already_in_group and (ended_well or size == 1):
            dist.destroy_process_group()
