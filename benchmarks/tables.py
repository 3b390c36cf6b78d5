"""What a benchmark's page shows of its rows, one ``Sheet`` per stage; medtrain.benchmarks.report draws it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Sheet:
    """The page of one stage.

    Attributes:
        columns: (title, key of a line, number format) each.
        place: where a row was measured; rows of one place share a table, which ``title`` names.
        lines: the rows of one table, with what ``columns`` shows besides.
        goals: a text each, which begins with "met", "missed" or "not judged".
        about: what the first line of the page says of the rows.
        cpu_note: one more note on a CPU; those of every page stand in ``legends/STAGE.md``.
    """

    columns: tuple[tuple[str, str, str], ...]
    place: Callable[[Row], str]
    title: Callable[[Row], str]
    lines: Callable[[list[Row]], list[Row]]
    goals: Callable[[list[Row]], Iterable[str]]
    about: Callable[[list[Row]], str]
    cpu_note: str


def name_of(row: Row) -> str:
    return f"{row['impl']} {row['variant']}".strip()


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _ratio(a: Any, b: Any) -> Any:
    """a / b, or whichever of them is no number: None, or the reason why it is missing."""
    for number in (a, b):
        if number is None or isinstance(number, str):
            return number
    return a / b


def _judge(goal: str, measured: float | str, form: str, *, least: float = -math.inf, most: float = math.inf) -> str:
    """The text of a goal; ``measured`` may be the reason why there is no number."""
    if isinstance(measured, str):
        return f"not judged: {goal} (measured: {measured})"
    return f"{'met' if least <= measured <= most else 'missed'}: {goal} (measured: {measured:{form}})"


def _not_measured(name: str, rows: Iterable[Row]) -> str:
    return f"{name} was not measured: {next((row['reason'] for row in rows if row['reason']), 'not in this file')}"


# --- the log-probability op ---------------------------------------------------------------------------------------------

_CASES = {
    ("frozen", True): "frozen head, forward and backward",
    ("trained", True): "trained head, forward and backward",
    ("frozen", False): "no gradient, forward",
}


def shape_name(num_rows: int, hidden_size: int, vocab_size: int, dtype: str) -> str:
    return f"N {num_rows}, H {hidden_size}, V {vocab_size}, {dtype}"


def _kernel_place(row: Row) -> str:
    return f"{shape_name(row['N'], row['H'], row['V'], row['dtype'])}: {_CASES[row['head'], row['gradient']]}"


_STAGES = ("forward", "backward", "both")


def _kernel_lines(rows: list[Row]) -> list[Row]:
    """One line per implementation: its row of the whole call, and the times of the stages."""
    lines, unit = [], None
    for name, own in grouped(rows, name_of).items():
        stages = {row["stage"]: row for row in own}
        line = dict(stages.get("both") or stages["forward"])
        line |= {f"{stage}_ms": stages[stage]["ms_median"] if stage in stages else None for stage in _STAGES}
        line["name"] = f"{name} ({line['tflops']:.3g} TFLOP/s)" if line["tflops"] else name
        line["extra_mb"] = _ratio(line["extra_bytes"], 1e6)
        line["kept_mb"] = _ratio(stages.get("forward", line)["kept_bytes"], 1e6)
        if name == "medtrain":
            unit = line["ms_median"]
        lines.append(line)
    return [line | {"ratio": _ratio(line["ms_median"], unit)} for line in lines]


def _kernel_goals(rows: list[Row]) -> Iterator[str]:
    """The goals for N = 8192, H = 3584 in bfloat16, where that shape was measured."""
    goals_of = (8192, 3584, "bfloat16", True, "both")
    at = [row for row in rows if (row["N"], row["H"], row["dtype"], row["gradient"], row["stage"]) == goals_of]
    whole = {(name_of(row), row["head"]): row for row in at}
    if not any(row["impl"] == "medtrain" for row in at):
        return

    def value(name: str, head: str, column: str) -> float | str:
        row = whole.get((name, head), {"reason": None})
        return _not_measured(name, [row]) if row.get(column) is None else row[column]

    for head, trl_factor in (("frozen", 1.35), ("trained", 1.3)):
        for peer, factor in (("trl", trl_factor), ("liger", 1.9)):
            faster = _ratio(value(peer, head, "ms_median"), value("medtrain", head, "ms_median"))
            yield _judge(f"{head} head: at least {factor} x as fast as {peer}", faster, ".2f", least=factor)
        share, error = value("medtrain", head, "floor_share"), value("medtrain", head, "margin_error_nats")
        yield _judge(f"{head} head: at least 80 % of the GEMM floor", share, ".0%", least=0.8)
        yield _judge(f"{head} head: margin error at most 1e-3 nat", error, ".1e", most=1e-3)
    frozen = _ratio(value("medtrain", "frozen", "extra_bytes"), 1e9)
    yield _judge("frozen head: at most 0.4 GB extra", frozen, ".2f", most=0.4)
    trained = _ratio(value("medtrain keep_bytes=0", "trained", "extra_bytes"), 1e9)
    yield _judge("trained head, keep_bytes=0: at most 0.7 GB extra beside dW", trained, ".2f", most=0.7)


def _kernel_about(rows: list[Row]) -> str:
    return f"medtrain took the path: {', '.join(sorted({row['path'] for row in rows if row.get('path')})) or 'none'}"


_KERNELS = Sheet(
    columns=(
        ("", "name", ""),
        *((f"{stage} ms", f"{stage}_ms", ".2f") for stage in _STAGES),
        ("spread", "ms_spread", ".2f"),
        ("x medtrain", "ratio", ".2f"),
        ("of floor", "floor_share", ".0%"),
        ("extra MB", "extra_mb", ".1f"),
        ("kept MB", "kept_mb", ".1f"),
        ("margin error", "margin_error_nats", ".1e"),
        ("dX error", "dx_error", ".1e"),
        ("dW error", "dw_error", ".1e"),
    ),
    place=_kernel_place,
    title=_kernel_place,
    lines=_kernel_lines,
    goals=_kernel_goals,
    about=_kernel_about,
    cpu_note="- On a CPU the milliseconds mean little, and the shape is small: memory and errors are what this table is for.",
)


# --- training steps -----------------------------------------------------------------------------------------------------


def _rpo_place(row: Row) -> str:
    return f"{row['model']}, {row['trained']}, {row['precision']}"


def _train_title(row: Row) -> str:
    lengths = "; ".join(f"{what}s {n['min']}-{n['max']} tokens, median {n['median']}" for what, n in row["lengths"].items())
    if "pairs_a_step" in row:
        return f"{_rpo_place(row)}, {row['pairs_a_step']} pairs a step ({lengths})"
    return f"{row['model']}, {row['trained']}, about {row['tokens_a_step']:,} tokens a step ({lengths})"


def _train_lines(rows: list[Row], speed: str) -> list[Row]:
    unit = next((row[speed] for row in rows if name_of(row) == "medtrain"), None)
    return [
        row
        | {"name": name_of(row), "ratio": _ratio(row[speed], unit), "step_mb": _ratio(row["step_extra_bytes"], 1e6)}
        | {"first_loss": row["losses"][0], "last_loss": row["losses"][-1]}
        for row in rows
    ]


def _rpo_goals(rows: list[Row]) -> Iterator[str]:
    """Speed and memory of the fastest row of each side, for the models that the goals name; everywhere the losses."""
    for place, here in grouped(rows, _rpo_place).items():
        if here[0]["model"] in ("1.5b", "7b"):
            speed, memory = (
                _ratio(*(_fastest(here, impl, column) for impl in ("medtrain", "trl")))
                for column in ("pairs_per_second", "max_memory_gib")
            )
            yield _judge(f"{place}: at least twice TRL's pairs/s, fastest row of each", speed, ".2f", least=2.0)
            yield _judge(f"{place}: less memory than TRL, in the same rows", memory, ".2f", most=1.0)
        yield _same_curve(place, here, "TRL")


def _cpt_goals(rows: list[Row]) -> Iterator[str]:
    for place, here in grouped(rows, _CPT.place).items():
        yield _same_curve(place, here, "Trainer")


def _fastest(rows: list[Row], impl: str, column: str) -> float | str:
    """A number of the fastest row of this impl, or the reason why there is none."""
    own = [row for row in rows if row["impl"] == impl]
    fastest = max((row for row in own if not row["reason"]), key=lambda row: row["pairs_per_second"], default=None)
    if fastest is None:
        return _not_measured(impl, own)
    return f"{name_of(fastest)} has no memory of a GPU" if fastest[column] is None else fastest[column]


def _same_curve(place: str, rows: list[Row], peer: str) -> str:
    """Whether the peer's losses are ours, which shows that both do the same work."""
    limit = 1e-4 if rows[0]["precision"] == "float32" else 5e-3
    theirs = [row["loss_difference"] for row in rows if row["impl"] == peer.lower() and row["same_pooling"]]
    absent = peer.lower() if any(row["impl"] == "medtrain" and not row["reason"] for row in rows) else "medtrain"
    reason = _not_measured(absent, [row for row in rows if row["impl"] == absent])
    measured = max((difference for difference in theirs if difference is not None), default=reason)
    goal = f"{place}: the same loss curve as {peer}, within {limit:.0e} relative over the first steps"
    return _judge(goal, measured, ".1e", most=limit)


def _train_about(rows: list[Row]) -> str:
    paths = dict.fromkeys(
        f"{row['impl']}: " + ", ".join(f"{name} {path}" for name, path in row["paths"].items()) for row in rows if row["paths"]
    )
    return "paths: " + ("; ".join(paths) or "none")


_STEP_COLUMNS = (
    ("step ms", "ms_median", ".1f"),
    ("spread", "ms_spread", ".1f"),
    ("useful", "useful_token_share", ".1%"),
    ("mfu", "mfu", ".1%"),
    ("max GiB", "max_memory_gib", ".2f"),
    ("step MB", "step_mb", ".1f"),
    ("loss 1st", "first_loss", ".5f"),
    ("last", "last_loss", ".5f"),
    ("off by", "loss_difference", ".1e"),
)

_RPO = Sheet(
    columns=(
        ("", "name", ""),
        ("pairs/s", "pairs_per_second", ".2f"),
        ("of medtrain", "ratio", ".2f"),
        ("useful tok/s", "tokens_per_second", ",.0f"),
        *_STEP_COLUMNS,
    ),
    place=_rpo_place,
    title=_train_title,
    lines=lambda rows: _train_lines(rows, "pairs_per_second"),
    goals=_rpo_goals,
    about=_train_about,
    cpu_note="""\
- On a CPU the model is tiny and its times mean little: loss, padding and our own step MB are what this table is for. TRL's head
  scores every position there, padding too, and holds a tile 32,768 entries wide whatever the vocabulary; on a GPU it scores
  completions alone.""",
)

_CPT = Sheet(
    columns=(
        ("", "name", ""),
        ("precision", "precision", ""),
        ("tok/s", "tokens_per_second", ",.0f"),
        ("of medtrain", "ratio", ".2f"),
        *_STEP_COLUMNS,
    ),
    place=lambda row: row["model"],
    title=_train_title,
    lines=lambda rows: _train_lines(rows, "tokens_per_second"),
    goals=_cpt_goals,
    about=_train_about,
    cpu_note="- On a CPU the model is tiny and its times mean little: loss and our own step MB are what this table is for.",
)

SHEETS = {"kernels": _KERNELS, "train-rpo": _RPO, "train-cpt": _CPT}
