"""The table and legend of the CPT stage of the training benchmark; medtrain.benchmarks.report puts them on a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medtrain.benchmarks.report import form_number, judge
from medtrain.benchmarks.train_tables import TOLERANCE, about, cells_of_a_step, name_of

__all__ = ["COLUMNS", "CPU_NOTE", "LEGEND", "about", "missing", "tables", "verdicts"]

COLUMNS = (
    "",
    "precision",
    "tok/s",
    "of medtrain",
    "step ms",
    "spread",
    "useful",
    "mfu",
    "max GiB",
    "step MB",
    "loss 1st",
    "last",
    "off by",
)

LEGEND = """\
- Each row ran in a process of its own on the same random weights, the same documents of random tokens in the same steps, one
  packed micro-batch a step, the same loss (mean over the step's predicted tokens), AdamW, clipping and learning rate. Weights are
  float32 masters computed in bfloat16 (ours by FSDP2's mixed precision, Trainer by autocast) where the precision is not float32.
- A step is timed from the end of the one before, the device idle at both ends: batches, forward, backward, clipping, update.
  Step ms: median after the warm-up; spread: 10th to 90th percentile, steps of different documents being different work. tok/s:
  predicted tokens over seconds, median over steps. Of medtrain: over our default's of the same model.
- useful: predicted tokens over the tokens the model was given.
- mfu: model FLOPs over the dense bf16 peak, also where products are in FP8: 6 x (parameters that multiply) x tokens
  + 6 x layers x heads x head size x sum of squared document lengths (causal, within documents), nothing recomputed. Dense bf16
  peaks: H100 and H200 989, H100 PCIe 756, A100 312 TFLOP/s.
- max GiB: torch's CUDA allocator over all steps, weights and optimizer included. step MB: on a CPU, the most allocated
  within a step beyond what was there before it, gradients included, weights and optimizer not.
- loss: of the first step and the last one compared, before its update; off by: the largest relative difference to our
  default's over those steps."""
CPU_NOTE = """\
- On a CPU the model is tiny and its times mean little: loss and our own step MB are what this table is for."""


def tables(rows: list[dict]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Per model: (title, lines of ``COLUMNS``) of the rows that ran."""
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model and not row["reason"]]
        if not here:
            continue
        unit = next((row["tokens_per_second"] for row in here if name_of(row) == "medtrain"), None)
        n = here[0]["lengths"]["document"]
        yield (
            f"{model}, all weights, about {here[0]['tokens_a_step']:,} tokens a step (documents {n['min']}-{n['max']} tokens, "
            f"median {n['median']})",
            [_line(row, unit) for row in here],
        )


def missing(rows: list[dict]) -> list[str]:
    """One text for each row that did not run."""
    return [f"{name_of(row)} did not run: {row['reason']} ({row['model']})" for row in rows if row["reason"]]


def verdicts(rows: list[dict]) -> list[dict[str, Any]]:
    """For each model: whether Trainer's losses are ours, which shows that both do the same work."""
    found: list[dict[str, Any]] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model and row["impl"] == "trainer"]
        if not here:
            continue
        limit = TOLERANCE[here[0]["precision"]]
        found += judge(
            f"{model}: the same loss curve as Trainer, within {limit:.0e} relative over the first steps",
            lambda here=here: _loss_difference(here),
            limit,
            False,
            ".1e",
        )
    return found


def _loss_difference(rows: list[dict]) -> float:
    found = [row["loss_difference"] for row in rows if row["same_pooling"] and row["loss_difference"] is not None]
    if not found:
        raise LookupError(f"not measured: {next((row['reason'] for row in rows if row['reason']), 'medtrain is missing')}")
    return max(found)


def _line(row: dict, unit: float | None) -> tuple[str, ...]:
    return (
        name_of(row),
        row["precision"],
        form_number(row["tokens_per_second"], ",.0f"),
        form_number(unit and row["tokens_per_second"] / unit, ".2f"),
        *cells_of_a_step(row),
    )
