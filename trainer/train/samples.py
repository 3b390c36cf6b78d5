"""Decoded samples: what a run's first steps take, as text, with the tokens that count between ⟦ and ⟧."""

from __future__ import annotations

import torch

from medtrain.trainer.data.batch import MicroBatch
from medtrain.trainer.distributed import World
from medtrain.trainer.train.stage import StageData


def decoded_samples(data: StageData, tokenizer, number: int) -> str:
    """The first ``number`` windows or pairs of the run, read back from the micro-batches that it would compute."""
    alone = World(0, 1, torch.device("cpu"), None)
    found: list[str] = []
    step = 0
    while len(found) < number:
        for batch in data.micro_batches(step, alone)[0]:
            found += _decoded(batch, data, tokenizer)
        step += 1
    return "\n\n".join(found[:number])


def _decoded(batch: MicroBatch, data: StageData, tokenizer) -> list[str]:
    samples = []
    if batch.pair_ids is None:
        for n, s in enumerate(batch.source_ids.tolist()):
            context, counted = _completion(batch, n)
            title = f"{data.sources[s].source.name}: {len(counted)} counted tokens"
            samples.append(f"--- {title}\n{tokenizer.decode(context)}⟦{tokenizer.decode(counted)}⟧")
        return samples
    assert batch.sides is not None
    for k, (s, i) in enumerate(zip(batch.source_ids.tolist(), batch.pair_ids.tolist(), strict=True)):
        prompt, chosen = _completion(batch, int(batch.sides[2 * k]))
        _, rejected = _completion(batch, int(batch.sides[2 * k + 1]))
        sizes = f"{len(prompt)} prompt, {len(chosen)} chosen, {len(rejected)} rejected tokens"
        samples.append(
            f"--- {data.sources[s].name}, row {data.sources[s].rows[i]}: {sizes}\n{tokenizer.decode(prompt)}\n"
            f"--- chosen\n⟦{tokenizer.decode(chosen)}⟧\n--- rejected\n⟦{tokenizer.decode(rejected)}⟧"
        )
    return samples


def _completion(batch: MicroBatch, n: int) -> tuple[list[int], list[int]]:
    """(the tokens that stand before the first counted one, the counted ones) of completion ``n``, as attention has it."""
    low, high = batch.target_cu_seqlens[n : n + 2].tolist()
    place = int(batch.counted[low])
    segment = int(torch.searchsorted(batch.cu_seqlens, place, right=True)) - 1
    keys = torch.arange(len(batch.input_ids)) if batch.key_index is None else batch.key_index
    seen = keys[batch.key_cu_seqlens[segment] : batch.key_cu_seqlens[segment + 1]]
    before = seen[: int((seen == place).nonzero()[0]) + 1]
    return batch.input_ids[before].tolist(), batch.targets[low:high].tolist()
