"""The table, goals and legend of the training benchmark's files; medtrain.benchmarks.report puts them on a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medtrain.benchmarks.report import form_number, judge

COLUMNS = (
    "",
    "pairs/s",
    "of medtrain",
    "useful tok/s",
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
# How far the losses of the first steps may lie apart, relative, for "the same curve".
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
GOAL_MODELS = ("1.5b", "7b")

LEGEND = """\
- Each row ran in a process of its own on the same random weights (and adapters), the same pairs in the same steps, the same
  loss (sigmoid + alpha * NLL of the chosen side, pooled over tokens), AdamW, clipping and learning rate; both have their
  reference log-probabilities computed before. Where all weights are trained they are float32 masters computed in the
  precision (ours by FSDP2's mixed precision, TRL by autocast); under LoRA the frozen base lies in it.
- A step is timed from the end of the one before, the device idle at both ends: batches, forward, backward, clipping, update,
  and whatever metrics the trainer computes in it. Step ms: median after the warm-up; spread: 10th to 90th percentile, steps
  of different pairs being different work; pairs/s follow from that median, tokens/s are the median over steps. Of medtrain:
  pairs/s over our default's.
- useful: the fewest positions anyone could compute (each distinct prompt of the step once, and of each completion all but
  its last token, which predicts nothing) over the tokens the model was given, padding included. useful tok/s counts them.
- mfu: model FLOPs of those positions alone (the head on completions only, nothing recomputed) over the bf16 dense peak.
- max GiB: torch's CUDA allocator over all steps, weights and optimizer included. step MB: on a CPU, the most allocated
  within a step beyond what was there before it, gradients included, weights and optimizer not.
- loss: of the first step and the last one compared, before its update; off by: the largest relative difference to our
  default's over those steps. TRL pools the NLL over a micro-batch, so it is the same loss with one micro-batch a step.
- TRL 1.16 has no padding-free batches (padding_free falls back with a warning)."""
CPU_NOTE = """\
- On a CPU the model is tiny and its times mean little: loss, padding and our own step MB are what this table is for. TRL's head
  scores every position there, padding too, and holds a tile 32,768 entries wide whatever the vocabulary; on a GPU it scores
  completions alone."""


def about(rows: list[dict]) -> str:
    """What the first line of the page says of the rows."""
    paths = dict.fromkeys(
        f"{row['impl']}: " + ", ".join(f"{name} {path}" for name, path in row["paths"].items()) for row in rows if row["paths"]
    )
    return "paths: " + ("; ".join(paths) or "none")


def tables(rows: list[dict]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Per model and precision: (title, lines of ``COLUMNS``) of the rows that ran."""
    for key in groups_of(rows):
        here = [row for row in rows if key_of(row) == key and not row["reason"]]
        if not here:
            continue
        unit = next((row["pairs_per_second"] for row in here if name_of(row) == "medtrain"), None)
        lengths = here[0]["lengths"]
        texts = (f"{what}s {n['min']}-{n['max']} tokens, median {n['median']}" for what, n in lengths.items())
        title = f"{title_of(key)}, {here[0]['pairs_a_step']} pairs a step ({'; '.join(texts)})"
        yield title, [_line(row, unit) for row in here]


def missing(rows: list[dict]) -> list[str]:
    """One text for each row that did not run."""
    return [f"{name_of(row)} did not run: {row['reason']} ({title_of(key_of(row))})" for row in rows if row["reason"]]


def verdicts(rows: list[dict]) -> list[dict[str, Any]]:
    """The goals, for each model of the rows that they are about: ``goal``, ``measured``, ``met``.

    Speed and memory compare the fastest row of each side, and are judged where bfloat16 ran on a device whose memory is
    known; ``met`` is None, and ``measured`` says why, where a side was not measured.
    """
    found: list[dict[str, Any]] = []
    for key in groups_of(rows):
        here = [row for row in rows if key_of(row) == key]
        title = title_of(key)
        if key[0] in GOAL_MODELS:
            found += judge(
                f"{title}: at least twice TRL's pairs/s, fastest row of each",
                lambda here=here: _fastest(here, "medtrain")["pairs_per_second"] / _fastest(here, "trl")["pairs_per_second"],
                2.0,
                True,
                ".2f",
            )
            found += judge(
                f"{title}: less memory than TRL, in the same rows",
                lambda here=here: _gib(_fastest(here, "medtrain")) / _gib(_fastest(here, "trl")),
                1.0,
                False,
                ".2f",
            )
        limit = TOLERANCE[key[1]]
        found += judge(
            f"{title}: the same loss curve as TRL, within {limit:.0e} relative over the first steps",
            lambda here=here: _loss_difference(here),
            limit,
            False,
            ".1e",
        )
    return found


def _fastest(rows: list[dict], impl: str) -> dict:
    ran = [row for row in rows if row["impl"] == impl and not row["reason"]]
    if not ran:
        raise LookupError(_not_measured(rows, impl))
    return max(ran, key=lambda row: row["pairs_per_second"])


def _gib(row: dict) -> float:
    if row["max_memory_gib"] is None:
        raise LookupError(f"{name_of(row)} has no memory of a GPU")
    return row["max_memory_gib"]


def _loss_difference(rows: list[dict]) -> float:
    found = [row["loss_difference"] for row in rows if row["impl"] == "trl" and row["same_pooling"]]
    found = [difference for difference in found if difference is not None]
    if not found:
        raise LookupError(_not_measured(rows, "trl" if any(name_of(row) == "medtrain" for row in rows) else "medtrain"))
    return max(found)


def _not_measured(rows: list[dict], impl: str) -> str:
    reasons = [row["reason"] for row in rows if row["impl"] == impl and row["reason"]]
    return f"{impl} was not measured: {reasons[0] if reasons else 'not in this file'}"


def _line(row: dict, unit: float | None) -> tuple[str, ...]:
    return (
        name_of(row),
        form_number(row["pairs_per_second"], ".2f"),
        form_number(unit and row["pairs_per_second"] / unit, ".2f"),
        form_number(row["tokens_per_second"], ",.0f"),
        *cells_of_a_step(row),
    )


def cells_of_a_step(row: dict) -> tuple[str, ...]:
    """What both stages say last of a row: milliseconds, useful share, mfu, memory and losses."""
    extra, losses = row["step_extra_bytes"], row["losses"]
    return (
        form_number(row["ms_median"], ".1f"),
        form_number(row["ms_spread"], ".1f"),
        form_number(row["useful_token_share"], ".1%"),
        form_number(row["mfu"], ".1%"),
        form_number(row["max_memory_gib"], ".2f"),
        form_number(None if extra is None else extra / 1e6, ".1f"),
        f"{losses[0]:.5f}",
        f"{losses[-1]:.5f}",
        form_number(row["loss_difference"], ".1e"),
    )


def name_of(row: dict) -> str:
    return f"{row['impl']} {row['variant']}".strip()


def key_of(row: dict) -> tuple[str, str, str]:
    return row["model"], row["precision"], row["trained"]


def title_of(key: tuple[str, str, str]) -> str:
    model, precision, trained = key
    return f"{model}, {trained}, {precision}"


def groups_of(rows: list[dict]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys(map(key_of, rows)))
