"""Preference pairs for Reasoning Preference Optimization, from questions with answers and sampled reasoning paths.

Strategies: ``explanation`` prefers the ground-truth explanation with its answer line over the model's own wrong path;
``sampled`` prefers a right path over a wrong one (Pang et al., Iterative Reasoning Preference Optimization,
arXiv:2404.19733, section 2); ``both`` makes both kinds. Completions begin exactly where generation begins, so that
training scores what the model itself would write.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medtrain.trainer.config.exam import PairsConfig
from medtrain.trainer.exam.generate import Output
from medtrain.trainer.exam.parse import Parsed, parse_output
from medtrain.trainer.exam.prompts import PromptStyle
from medtrain.trainer.exam.questions import Question
from medtrain.trainer.exam.scoring import is_right
from medtrain.trainer.exam.statements import squeeze

KINDS = ("right", "bare", "wrong", "unparsed", "truncated", "duplicate")


@dataclass(frozen=True)
class GradedPath:
    index: int  # among its question's paths
    text: str  # without white space at the end
    kind: str  # of KINDS
    parsed: Parsed = field(compare=False)


def grade_paths(question: Question, outputs: Sequence[Output], style: PromptStyle, config: PairsConfig) -> list[GradedPath]:
    """Grade the paths of one question; a repeat of an earlier one is a ``duplicate``, and a right one with less than
    ``min_explanation`` letters and digits besides its answer is ``bare``. ``unlisted_is_wrong`` counts an unread answer as
    wrong if the path ends with one answer line and that names no choice: so writes a model that answers another question."""
    graded, seen = [], set()
    for index, output in enumerate(outputs):
        # White space at the end carries nothing; the eos of training follows the last word.
        text = output.text.rstrip()
        parsed = parse_output(text, question, **style.parse_settings("explain"))
        if text in seen:
            kind = "duplicate"
        elif output.truncated:
            kind = "truncated"
        elif parsed.failure:
            unlisted = config.unlisted_is_wrong and parsed.failure == "no answer found"
            kind = "wrong" if unlisted and _names_no_choice(text, question, style) else "unparsed"
        elif not is_right(question, parsed):
            kind = "wrong"
        else:
            explanation = text.replace(parsed.read_from, "", 1)
            kind = "right" if sum(letter.isalnum() for letter in explanation) >= config.min_explanation else "bare"
        seen.add(text)
        graded.append(GradedPath(index, text, kind, parsed))
    return graded


def _names_no_choice(text: str, question: Question, style: PromptStyle) -> bool:
    """Whether a path ends with its only answer line, and this holds neither a choice's text nor a choice's letter."""
    _, _, line = text.partition(style.answer_marker)
    answer = squeeze(line)
    if question.is_numeric or not answer or squeeze(style.answer_marker) in answer or "\n" in line.strip():
        return False
    return answer.lower() not in question.letters and not any(squeeze(choice) in answer for choice in question.choices)


@dataclass(frozen=True)
class _Pair:
    """A possible pair of one question."""

    strategy: str
    chosen: str
    rejected: str
    chosen_path: int | None  # None: the ground truth
    rejected_path: GradedPath

    @property
    def longer(self) -> float:
        """Log of how many times as long, in characters, the chosen side is."""
        return math.log(max(1, len(self.chosen)) / max(1, len(self.rejected)))

    def row(self, question: Question, prompt: str) -> dict[str, Any]:
        provenance = {"chosen_path": self.chosen_path, "rejected_path": self.rejected_path.index}
        provenance["rejected_answer"] = self.rejected_path.parsed.value
        row = {"prompt": prompt, "chosen": self.chosen, "rejected": self.rejected, "question_id": question.problem_id}
        return row | {"strategy": self.strategy, "provenance": provenance}


def build_pairs(
    questions: Sequence[Question],
    prompts: Sequence[str],
    graded_by_question: Mapping[str, Sequence[GradedPath]],
    style: PromptStyle,
    config: PairsConfig,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Pair up graded paths: rows in the order of the questions, at most ``max_per_question`` each (an even share of both kinds
    under ``both``, as far as there are enough), drawn by ``seed`` and question id alone; and the summary.

    ``balance_length``: of the pairs that the cap leaves to choose from, those are taken that keep the sum of
    log(chosen length / rejected length) over all rows nearest to 0, so that length tells less which side is chosen.
    Every path is still used before one is used twice. ``lengths`` (characters) compares the rows with those of the draw alone.

    A right path that is ``bare`` is not chosen: preferring it would teach the model to leave the explanation out.
    A path that was cut off is neither chosen nor rejected, for training would put an eos where the model never ended.
    Nor is one whose answer cannot be read: that it is wrong would be a guess. A ground truth that the parser does not read
    as the right answer is not used.
    """
    rows: list[dict[str, Any]] = []
    drawn: list[_Pair] = []
    taken: list[_Pair] = []
    seen: set[tuple[str, str, str]] = set()
    kinds, reasons, num_drawn = Counter(), Counter(), Counter()
    left_out, repeated, longer = 0, 0, 0.0
    for question, prompt in zip(questions, prompts, strict=True):
        graded = graded_by_question.get(question.problem_id, ())
        kinds.update(path.kind for path in graded)
        truth = ground_truth(question, style) if config.strategy != "sampled" else None
        possible = _pair_up(question, graded, truth, config)
        made = _capped(*possible, config.max_per_question, num_drawn)
        if not made:
            reasons[_why_none(question, graded, truth, config.strategy)] += 1
            continue
        counts = Counter(pair.strategy for pair in made)
        num_drawn += counts
        drawn += made
        if config.balance_length:
            made = _balanced(possible, counts, longer)
        left_out += sum(map(len, possible)) - len(made)
        before = len(taken)
        for pair in made:
            key = (prompt, pair.chosen, pair.rejected)
            if key in seen:
                repeated += 1
                continue
            seen.add(key)
            longer += pair.longer
            taken.append(pair)
            rows.append(pair.row(question, prompt))
        if len(taken) == before:
            reasons["the same pairs as another question"] += 1
    summary = {
        "pairs": dict(Counter(pair.strategy for pair in taken)),
        "questions": len(questions),
        "questions_with_pairs": len(questions) - reasons.total(),
        "without_pairs": dict(reasons),
        "paths": {kind: kinds[kind] for kind in KINDS},
        "left_out_by_cap": left_out,
        "duplicate_pairs": repeated,
        "lengths": {"balanced": config.balance_length, "drawn": _lengths(drawn), "written": _lengths(taken)},
    }
    return rows, summary


def _lengths(pairs: Sequence[_Pair]) -> dict[str, float | None]:
    """Mean characters of both sides, and the share of pairs whose chosen side is the longer one (equal: half)."""
    sides = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    sums = {
        "mean_chosen": sum(chosen for chosen, _ in sides),
        "mean_rejected": sum(rejected for _, rejected in sides),
        "chosen_longer": sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in sides),
    }
    return {name: total / len(sides) if sides else None for name, total in sums.items()}


def ground_truth(question: Question, style: PromptStyle) -> str | None:
    """The ground-truth completion, if the question has an explanation and the parser reads it as right."""
    if not (question.explanation or "").strip():
        return None
    truth = style.completion(question, "explain")
    return truth if is_right(question, parse_output(truth, question, **style.parse_settings("explain"))) else None


def _pair_up(
    question: Question, graded: Sequence[GradedPath], truth: str | None, config: PairsConfig
) -> tuple[list[_Pair], list[_Pair]]:
    """All pairs with the ground truth, and all of sampled paths, in the order of use."""
    draw = random.Random(f"{config.seed}:{question.problem_id}")
    right = [path for path in graded if path.kind in ("right", "bare")]
    wrong = [path for path in graded if path.kind == "wrong"]
    draw.shuffle(right)
    draw.shuffle(wrong)
    right = [path for path in right if path.kind == "right"]  # after the draw, so that min_explanation changes no other
    explained = [_Pair("explanation", truth, path.text, None, path) for path in wrong] if truth is not None else []
    if config.strategy == "explanation":
        return explained, []
    # Diagonals of the right x wrong table: every path is used before one is used twice.
    table = [(r, w) for r in range(len(right)) for w in range(len(wrong))]
    table.sort(key=lambda cell: (cell[1] - cell[0]) % max(len(right), len(wrong)))
    return explained, [_Pair("sampled", right[r].text, wrong[w].text, right[r].index, wrong[w]) for r, w in table]


def _capped(explained: list[_Pair], sampled: list[_Pair], cap: int, so_far: Mapping[str, int]) -> list[_Pair]:
    """Half of the cap for each kind, as far as there are pairs; an odd one for the kind that has had fewer ``so_far``."""
    odd = cap % 2 and so_far["explanation"] <= so_far["sampled"]
    made = explained[: max(cap // 2 + odd, cap - len(sampled))]
    return made + sampled[: cap - len(made)]


def _balanced(possible: Sequence[list[_Pair]], counts: Mapping[str, int], longer: float) -> list[_Pair]:
    """As many pairs of each kind as ``counts`` says, each the one that takes the running sum ``longer`` nearest to 0."""
    made: list[_Pair] = []
    for pairs in possible:
        left, uses = list(pairs), Counter()
        for _ in range(counts[pairs[0].strategy] if pairs else 0):
            best = min(left, key=lambda p: (uses[p.chosen_path] + uses[p.rejected_path.index], abs(longer + p.longer)))
            left.remove(best)
            uses.update({best.chosen_path: best.chosen_path is not None, best.rejected_path.index: 1})
            longer += best.longer
            made.append(best)
    return made


def _why_none(question: Question, graded: Sequence[GradedPath], truth: str | None, strategy: str) -> str:
    if not graded:
        return "no paths"
    kinds = {path.kind for path in graded}
    if kinds <= {"bare", "duplicate"}:
        return "no path with an explanation"
    if not kinds & {"right", "bare", "wrong"}:
        return "no path with a readable answer" if "unparsed" in kinds else "every path was cut off"
    if "wrong" not in kinds:
        return "no wrong path"
    explanation = "no explanation"
    if question.explanation and truth is None:
        explanation = "no explanation that is read as the right answer"
    if strategy == "explanation":
        return explanation
    right = "no right path that explains" if "bare" in kinds else "no right path"
    return right if strategy == "sampled" else f"{right} and {explanation}"
