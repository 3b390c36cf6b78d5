"""The tables, goals and legend of the kernel benchmark's files; medtrain.benchmarks.report puts them on a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medtrain.benchmarks.report import form_number, judge

CASES = (("frozen", True), ("trained", True), ("frozen", False))
TITLES = {
    ("frozen", True): "frozen head, forward and backward",
    ("trained", True): "trained head, forward and backward",
    ("frozen", False): "no gradient, forward",
}
COLUMNS = (
    "",
    "forward ms",
    "backward ms",
    "both ms",
    "spread",
    "x medtrain",
    "of floor",
    "extra MB",
    "kept MB",
    "margin error",
    "dX error",
    "dW error",
)

LEGEND = """\
- ms: median over rounds in which every implementation ran once, in turn, after a warm-up (CUDA events, or a clock on the
  CPU); spread: 10th to 90th percentile of the whole call. Caches are not flushed: at these sizes the weight alone exceeds
  a GPU's L2. x medtrain: the time over that of medtrain at its default.
- of floor: time of the floor over the time. The floor is the GEMMs that the mode cannot do without (2NVH without
  gradient, 4NVH frozen, 6NVH trained), as bare torch.mm calls in the same rounds.
- extra: the most memory allocated at any moment of the call beyond what was there before it, output and gradient of
  hidden included; for a trained head minus the gradient of the weight, which any method must return. kept: what of it
  waits between forward and backward (a gradient of the weight too, if the forward makes it). As torch's allocator counts.
- errors: against float64 on peaked logits (targets from nearly certain down to about -20 nats): largest error of a
  pair's summed margin, in nats, over sequences of about 512 tokens; gradients of the mean DPO loss, relative Frobenius
  error (of the weight: the targets' rows and an even sample of the others)."""
CPU_NOTE = "- On a CPU the milliseconds mean little, and the shape is small: memory and errors are what this table is for."


def shape_name(num_rows: int, hidden_size: int, vocab_size: int, dtype: str) -> str:
    return f"N {num_rows}, H {hidden_size}, V {vocab_size}, {dtype}"


def tables(rows: list[dict]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Per shape, dtype and case: (title, lines of ``COLUMNS``) of the implementations that ran."""
    for shape in dict.fromkeys((row["N"], row["H"], row["V"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["N"], row["H"], row["V"], row["dtype"]) == shape]
        for case in CASES:
            named: dict[tuple[str, str], dict[str, dict]] = {}
            for row in here:
                if (row["head"], row["gradient"]) == case:
                    named.setdefault((row["impl"], row["variant"]), {})[row["stage"]] = row
            whole = "both" if case[1] else "forward"
            unit = (named.get(("medtrain", ""), {}).get(whole) or {}).get("ms_median")
            lines = [
                _line(f"{impl} {variant}".strip(), stages, stages[whole], unit)
                for (impl, variant), stages in named.items()
                if not stages[whole]["reason"]
            ]
            if lines:
                yield f"{shape_name(*shape)}: {TITLES[case]}", lines


def missing(rows: list[dict]) -> list[str]:
    """One text for each implementation and reason why it did not run, with the places if it ran in others."""
    places: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        title = f"{shape_name(row['N'], row['H'], row['V'], row['dtype'])}: {TITLES[row['head'], row['gradient']]}"
        by_reason = places.setdefault(f"{row['impl']} {row['variant']}".strip(), {})
        by_reason.setdefault(row["reason"], []).append(title)
    return [
        f"{name} did not run: {reason}" + ("" if len(by_reason) == 1 else f" ({'; '.join(titles)})")
        for name, by_reason in places.items()
        for reason, titles in by_reason.items()
        if reason
    ]


def _line(name: str, stages: dict[str, dict], row: dict, unit: float | None) -> tuple[str, ...]:
    def ms(stage: str) -> str:
        return form_number(stages.get(stage, {}).get("ms_median"), ".2f")

    def megabytes(value: int | None) -> str:
        return form_number(None if value is None else value / 1e6, ".1f")

    return (
        f"{name} ({row['tflops']:.3g} TFLOP/s)" if row["tflops"] else name,
        ms("forward"),
        ms("backward"),
        ms("both"),
        form_number(row["ms_spread"], ".2f"),
        form_number(unit and row["ms_median"] / unit, ".2f"),
        form_number(row["floor_share"], ".0%"),
        megabytes(row["extra_bytes"]),
        megabytes(stages.get("forward", {}).get("kept_bytes")),
        form_number(row["margin_error_nats"], ".1e"),
        form_number(row["dx_error"], ".1e"),
        form_number(row["dw_error"], ".1e"),
    )


def verdicts(rows: list[dict]) -> list[dict[str, Any]]:
    """The goals for N = 8192, H = 3584 in bfloat16, for rows that hold that shape: ``goal``, ``measured``, ``met``.

    ``met`` is None, and ``measured`` says why, where one side was not measured.
    """
    at = [row for row in rows if (row["N"], row["H"], row["dtype"]) == (8192, 3584, "bfloat16") and row["gradient"]]
    whole = {(row["impl"], row["variant"], row["head"]): row for row in at if row["stage"] == "both"}
    if not any(impl == "medtrain" for impl, _, _ in whole):
        return []
    found: list[dict[str, Any]] = []

    def value(key: tuple[str, str, str], column: str) -> float:
        row = whole.get(key)
        if row is None or row[column] is None:
            raise LookupError(f"{key[0]} was not measured: {row and row['reason'] or 'not in this file'}")
        return row[column]

    for head, trl_factor in (("frozen", 1.35), ("trained", 1.3)):
        for peer, factor in (("trl", trl_factor), ("liger", 1.9)):
            found += judge(
                f"{head} head: at least {factor} x as fast as {peer}",
                lambda head=head, peer=peer: value((peer, "", head), "ms_median") / value(("medtrain", "", head), "ms_median"),
                factor,
                True,
                ".2f",
            )
        found += judge(
            f"{head} head: at least 80 % of the GEMM floor",
            lambda head=head: value(("medtrain", "", head), "floor_share"),
            0.8,
            True,
            ".0%",
        )
        found += judge(
            f"{head} head: margin error at most 1e-3 nat",
            lambda head=head: value(("medtrain", "", head), "margin_error_nats"),
            1e-3,
            False,
            ".1e",
        )
    found += judge(
        "frozen head: at most 0.4 GB extra", lambda: value(("medtrain", "", "frozen"), "extra_bytes") / 1e9, 0.4, False, ".2f"
    )
    found += judge(
        "trained head, keep_bytes=0: at most 0.7 GB extra beside dW",
        lambda: value(("medtrain", "keep_bytes=0", "trained"), "extra_bytes") / 1e9,
        0.7,
        False,
        ".2f",
    )
    return found


def about(rows: list[dict]) -> str:
    """What the first line of the page says of the rows."""
    paths = sorted({row["path"] for row in rows if row.get("path")})
    return f"medtrain took the path: {', '.join(paths) or 'none'}"
