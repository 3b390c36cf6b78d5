"""LogpsHead under FSDP2 on two ranks: the gradient is the single process's, whatever falls to which rank."""

import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from medtrain.kernels.head import LogpsHead
from medtrain.kernels.logps import chunked_logps

HIDDEN, VOCAB = 12, 61
# Rows of (rank, micro-batch): ragged, and one rank has an empty micro-batch.
ROWS = {(0, 0): 17, (1, 0): 30, (0, 1): 9, (1, 1): 0}


class Model(nn.Module):
    def __init__(self, keep_bytes):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.body = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.body.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator) / 4)
        self.head = LogpsHead(nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator)), keep_bytes=keep_bytes)

    def forward(self, inputs, targets):
        return self.head(torch.tanh(self.body(inputs)), targets)


def batch(rank, micro_batch):
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    num_rows = ROWS[rank, micro_batch]
    return torch.randn(num_rows, HIDDEN, generator=generator), torch.randint(VOCAB, (num_rows,), generator=generator)


def train_one_rank(rank, folder, keep_bytes, sync_every_micro_batch):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Model(keep_bytes)
    # A mesh of its own: on a machine with a GPU the default one would be there.
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for micro_batch in range(2):
        model.set_requires_gradient_sync(sync_every_micro_batch or micro_batch == 1)
        # FSDP averages over ranks; the denominator is that of the whole step.
        (-model(*batch(rank, micro_batch)).sum() * 2 / sum(ROWS.values())).backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    try:
        chunked_logps(torch.zeros(1, HIDDEN), model.head.weight, torch.zeros(1, dtype=torch.int64))
    except ValueError as error:
        gradients["error"] = str(error)
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("sync_every_micro_batch", [True, False])
@pytest.mark.parametrize("keep_bytes", [None, 0])
def test_two_ranks_accumulate_the_gradient_of_one_process(keep_bytes, sync_every_micro_batch, tmp_path):
    # Fork: a child starts in a tenth of a second, with everything imported.
    mp.start_processes(train_one_rank, args=(str(tmp_path), keep_bytes, sync_every_micro_batch), nprocs=2, start_method="fork")
    found = torch.load(tmp_path / "gradients.pt")
    assert "sharded DTensor" in found.pop("error")

    model = Model(keep_bytes)
    inputs, targets = (torch.cat(parts) for parts in zip(*(batch(*key) for key in ROWS), strict=True))
    (-model(inputs, targets).sum() / sum(ROWS.values())).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == wanted.keys() and "head.weight" in found
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_head_takes_the_parameter_of_the_layer_it_replaces():
    embedding = nn.Embedding(VOCAB, HIDDEN)
    head = LogpsHead(embedding.weight)
    assert head.weight is embedding.weight
    assert list(head.state_dict()) == ["weight"]
    hidden, targets = batch(0, 0)
    assert torch.equal(head(hidden, targets), chunked_logps(hidden, embedding.weight, targets))
