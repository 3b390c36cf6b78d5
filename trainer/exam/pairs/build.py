"""Preference pairs for Reasoning Preference Optimization, from questions with answers and sampled reasoning paths.

Strategy ``explanation`` prefers the ground-truth explanation over the model's own wrong path, ``sampled`` a right path over a
wrong one (Pang et al., Iterative Reasoning Preference Optimization, arXiv:2404.19733, section 2); ``both`` makes both kinds.
Completions begin exactly where generation begins, so that training scores what the model itself would write.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from medtrain.trainer.config.exam import PairsConfig
from medtrain.trainer.exam.generate import Output
from medtrain.trainer.exam.parse import parse_output
from medtrain.trainer.exam.prompts import PromptStyle
from medtrain.trainer.exam.questions import Question
from medtrain.trainer.exam.scoring import Row, is_right
from medtrain.trainer.exam.statements import squeeze

_SIDES = ("chosen_path", "rejected_path")
KINDS = ("right", "bare", "wrong", "unparsed", "truncated", "duplicate")


def grade_paths(question: Question, outputs: Sequence[Output], style: PromptStyle, config: PairsConfig) -> list[Row]:
    """Grade the paths of one question, each a row with its ``kind``; a repeat of an earlier one is a ``duplicate``, a right one
    with less than ``min_explanation`` letters and digits besides its answer is ``bare``. ``unlisted_is_wrong`` counts an unread
    answer as wrong if the path ends with one answer line and that names no choice."""
    graded, seen = [], set()
    for number, output in enumerate(outputs):
        text = output.text.rstrip()  # white space at the end carries nothing; the eos of training follows the last word
        parsed = parse_output(text, question, **style.parse_settings("explain"))
        unlisted = config.unlisted_is_wrong and parsed.failure == "no answer found" and _names_no_choice(text, question, style)
        if text in seen:
            kind = "duplicate"
        elif output.truncated:
            kind = "truncated"
        elif parsed.failure:
            kind = "wrong" if unlisted else "unparsed"
        elif not is_right(question, parsed):
            kind = "wrong"
        else:
            explanation = text.replace(parsed.read_from, "", 1)
            kind = "right" if sum(map(str.isalnum, explanation)) >= config.min_explanation else "bare"
        seen.add(text)
        row = {"problem_id": question.problem_id, "path": number, "output": output.text, "truncated": output.truncated}
        row |= {"kind": kind, "parsed": parsed.value, "read_from": parsed.read_from, "failure": parsed.failure}
        graded.append(row)
    return graded


def _names_no_choice(text: str, question: Question, style: PromptStyle) -> bool:
    """Whether a path ends with its only answer line, and this holds neither a choice's text nor a choice's letter."""
    line = text.partition(style.answer_marker)[2]
    answer = squeeze(line)
    if question.is_numeric or not answer or squeeze(style.answer_marker) in answer or "\n" in line.strip():
        return False
    return answer.lower() not in question.letters and not any(squeeze(choice) in answer for choice in question.choices)


def build_pairs(
    questions: Sequence[Question],
    prompts: Sequence[str],
    graded_by_question: Mapping[str, Sequence[Row]],
    style: PromptStyle,
    config: PairsConfig,
) -> tuple[list[Row], dict[str, Any]]:
    """Pair up graded paths: rows in the order of the questions, at most ``max_per_question`` each (an even share of both kinds
    under ``both``, as far as there are enough), drawn by ``seed`` and question id alone; and the summary.

    ``balance_length``: of the pairs that the cap leaves to choose from, those are taken that keep the sum of
    log(chosen length / rejected length) over all rows nearest to 0. Every path is still used before one is used twice.
    ``lengths`` (characters) compares the rows with those of the draw alone. Not used: a ``bare`` path as the chosen one, which
    would teach to leave the explanation out; a path that was cut off, for training would put an eos where the model never
    ended; one whose answer cannot be read; a ground truth that the parser does not read as the right answer.
    """
    rows: list[Row] = []
    drawn: list[Row] = []
    seen: set[tuple[str, str, str]] = set()
    kinds, reasons, num_drawn = Counter(), Counter(), Counter()
    left_out, repeated, longer, cap = 0, 0, 0.0, config.max_per_question
    for question, prompt in zip(questions, prompts, strict=True):
        graded = graded_by_question[question.problem_id]
        kinds.update(path["kind"] for path in graded)
        truth = ground_truth(question, style) if config.strategy != "sampled" else None
        explained, sampled = possible = _pair_up(question, prompt, graded, truth, config)
        # Half of the cap for each kind, as far as there are pairs; an odd one for the kind of which fewer have been drawn.
        odd = cap % 2 and num_drawn["explanation"] <= num_drawn["sampled"]
        made = explained[: max(cap // 2 + odd, cap - len(sampled))]
        made += sampled[: cap - len(made)]
        if not made:
            reasons[_why_none(question, graded, truth, config.strategy)] += 1
            continue
        drawn += made
        num_drawn += (counts := Counter(row["strategy"] for row in made))
        if config.balance_length:
            made = _balanced(possible, counts, longer)
        left_out += sum(map(len, possible)) - len(made)
        new = []
        for row in made:
            key = (prompt, row["chosen"], row["rejected"])
            if key not in seen:
                seen.add(key)
                longer += _longer(row)
                new.append(row)
        rows += new
        repeated += len(made) - len(new)
        if not new:
            reasons["the same pairs as another question"] += 1
    summary = {
        "pairs": dict(Counter(row["strategy"] for row in rows)),
        "questions": len(questions),
        "questions_with_pairs": len(questions) - reasons.total(),
        "without_pairs": dict(reasons),
        "paths": {kind: kinds[kind] for kind in KINDS},
        "left_out_by_cap": left_out,
        "duplicate_pairs": repeated,
        "lengths": {"balanced": config.balance_length, "drawn": _lengths(drawn), "written": _lengths(rows)},
    }
    return rows, summary


def _longer(row: Row) -> float:
    """Log of how many times as long, in characters, the chosen side is."""
    return math.log(max(1, len(row["chosen"])) / max(1, len(row["rejected"])))


def _lengths(rows: Sequence[Row]) -> dict[str, float | None]:
    """Mean characters of both sides, and the share of pairs whose chosen side is the longer one (equal: half)."""
    sides = [(len(row["chosen"]), len(row["rejected"])) for row in rows]
    columns = [(*side, (side[0] > side[1]) + (side[0] == side[1]) / 2) for side in sides]
    means = [sum(column) / len(sides) for column in zip(*columns, strict=True)] or [None] * 3
    return dict(zip(("mean_chosen", "mean_rejected", "chosen_longer"), means, strict=True))


def ground_truth(question: Question, style: PromptStyle) -> str | None:
    """The ground-truth completion, if the question has an explanation and the parser reads it as right."""
    if not (question.explanation or "").strip():
        return None
    truth = style.completion(question, "explain")
    return truth if is_right(question, parse_output(truth, question, **style.parse_settings("explain"))) else None


def _pair_up(
    question: Question, prompt: str, graded: Sequence[Row], truth: str | None, config: PairsConfig
) -> tuple[list[Row], list[Row]]:
    """All pairs with the ground truth, and all of sampled paths, in the order of use."""

    def row(strategy: str, chosen: str, chosen_path: int | None, rejected: Row) -> Row:
        provenance = {"chosen_path": chosen_path, "rejected_path": rejected["path"], "rejected_answer": rejected["parsed"]}
        sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected["output"].rstrip()}
        return sides | {"question_id": question.problem_id, "strategy": strategy, "provenance": provenance}

    draw = random.Random(f"{config.seed}:{question.problem_id}")
    right = [path for path in graded if path["kind"] in ("right", "bare")]
    wrong = [path for path in graded if path["kind"] == "wrong"]
    draw.shuffle(right)
    draw.shuffle(wrong)
    right = [path for path in right if path["kind"] == "right"]  # after the draw, so that min_explanation changes no other
    explained = [row("explanation", truth, None, path) for path in wrong] if truth is not None else []
    if config.strategy == "explanation":
        return explained, []
    # Diagonals of the right x wrong table: every path is used before one is used twice.
    table = [(r, w) for r in range(len(right)) for w in range(len(wrong))]
    table.sort(key=lambda cell: (cell[1] - cell[0]) % max(len(right), len(wrong)))
    return explained, [row("sampled", right[r]["output"].rstrip(), right[r]["path"], wrong[w]) for r, w in table]


def _balanced(possible: Sequence[list[Row]], counts: Mapping[str, int], longer: float) -> list[Row]:
    """As many pairs of each kind as ``counts`` says, each the one that takes the running sum ``longer`` nearest to 0."""
    made: list[Row] = []
    for rows in possible:
        left, uses = list(rows), Counter()

        for _ in range(counts[rows[0]["strategy"]] if rows else 0):
            costs = [(sum(uses[row["provenance"][side]] for side in _SIDES), abs(longer + _longer(row))) for row in left]
            made.append(left.pop(costs.index(min(costs))))
            uses.update(made[-1]["provenance"][side] for side in _SIDES)
            longer += _longer(made[-1])
    return made


def _why_none(question: Question, graded: Sequence[Row], truth: str | None, strategy: str) -> str:
    kinds = {path["kind"] for path in graded}
    if not kinds:
        return "no paths"
    if kinds <= {"bare", "duplicate"}:
        return "no path with an explanation"
    if not kinds & {"right", "bare", "wrong"}:
        return "no path with a readable answer" if "unparsed" in kinds else "every path was cut off"
    if "wrong" not in kinds:
        return "no wrong path"
    right = "no right path that explains" if "bare" in kinds else "no right path"
    unread = " that is read as the right answer" if question.explanation and truth is None else ""
    reasons = {"explanation": f"no explanation{unread}", "sampled": right, "both": f"{right} and no explanation{unread}"}
    return reasons[strategy]
