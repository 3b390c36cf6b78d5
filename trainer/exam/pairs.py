"""Preference pairs for Reasoning Preference Optimization, from questions with answers and sampled reasoning paths.

Strategies: ``explanation`` prefers the ground-truth explanation with its answer line over the model's own wrong path;
``sampled`` prefers a right path over a wrong one (Pang et al., Iterative Reasoning Preference Optimization,
arXiv:2404.19733, section 2); ``both`` makes both kinds. Prompts are those of explain mode, and completions begin
exactly where generation begins, so that training scores what the model itself would write.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medtrain.trainer.errors import bad_input
from medtrain.trainer.exam.generate import HFEngine, VLLMEngine, load_engine
from medtrain.trainer.exam.parse import parse_output
from medtrain.trainer.exam.prompts import PromptStyle
from medtrain.trainer.exam.questions import Question, load_questions
from medtrain.trainer.exam.scoring import grade_output, to_jsonl, write_atomically
from medtrain.trainer.exam.statements import squeeze

STRATEGIES = ("explanation", "sampled", "both")


@dataclass(frozen=True)
class ReasoningPath:
    """One sampled reasoning path: the prompt, what the model wrote after it, and whether the token limit cut it off."""

    prompt: str
    output: str
    truncated: bool = False


def sample_paths(
    engine: HFEngine | VLLMEngine,
    questions: Sequence[Question],
    *,
    num_paths: int,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 1024,
    style: PromptStyle | None = None,
    demonstrations: Sequence[Question] = (),
) -> dict[str, list[ReasoningPath]]:
    """Sample ``num_paths`` reasoning paths a question in explain mode: problem_id -> paths."""
    if num_paths < 1 or temperature <= 0:
        raise bad_input("sampling needs num_paths of 1 or more and a temperature above 0")
    style = style or PromptStyle()
    prompts = [style.prompt(question, "explain", engine.tokenizer, demonstrations) for question in questions]
    outputs = engine.generate(
        [prompt for prompt in prompts for _ in range(num_paths)],
        max_new_tokens=max_new_tokens,
        stop=style.stop("explain"),
        temperature=temperature,
        seed=seed,
    )
    paths: dict[str, list[ReasoningPath]] = {}
    for index, output in enumerate(outputs):
        question = questions[index // num_paths]
        path = ReasoningPath(prompts[index // num_paths], output.text, output.truncated)
        paths.setdefault(question.problem_id, []).append(path)
    return paths


def build_pairs(
    questions: Sequence[Question],
    paths_by_question: Mapping[str, Sequence[ReasoningPath]],
    *,
    strategy: str = "both",
    max_per_question: int = 8,
    seed: int = 0,
    style: PromptStyle | None = None,
    unlisted_is_wrong: bool = False,
) -> tuple[list[dict], dict]:
    """Grade paths and pair them up.

    Returns rows ``{prompt, chosen, rejected, question_id, strategy}`` in the order of the questions, at most
    ``max_per_question`` each (an even share of both kinds under ``both``, as far as there are enough), drawn by
    ``seed`` and question id alone; and a summary: ``pairs`` (by strategy), ``questions``, ``questions_with_pairs``,
    ``without_pairs`` (reason -> questions), ``paths`` (right, wrong, unparsed, truncated, duplicate) and
    ``left_out_by_cap``.

    A path that was cut off is neither chosen nor rejected, for training would put an eos where the model never ended.
    Nor is one whose answer cannot be read: that it is wrong would be a guess. Where the style has the text of a choice
    as the answer, ``unlisted_is_wrong`` counts it as wrong if it ends with one answer line and that names no choice at
    all: a model that answers another question than the one asked writes such paths, and they are worth preferring
    against. The exam's own score does not depend on this.
    """
    if strategy not in STRATEGIES:
        raise bad_input("unknown", field="strategy", found=strategy, expected=", ".join(STRATEGIES))
    if max_per_question < 1:
        raise bad_input("must be 1 or more", field="max_per_question", found=max_per_question)
    style = style or PromptStyle()
    if unlisted_is_wrong and style.answer_as != "text":
        raise bad_input(
            "needs answers that are texts of choices",
            field="unlisted_is_wrong",
            expected='a style with answer_as="text"',
        )
    rows: list[dict] = []
    paths_seen, reasons, left_out, with_pairs = Counter(), Counter(), 0, 0
    for question in questions:
        paths = paths_by_question.get(question.problem_id, ())
        graded = _grade_paths(question, paths, style, unlisted_is_wrong)
        paths_seen.update({kind: len(members) for kind, members in graded.items()})
        possible = _pair_up(question, graded, strategy, seed, style)
        made = _capped(*possible, max_per_question)
        if not made:
            reasons[_why_none(question, paths, graded, strategy)] += 1
            continue
        with_pairs += 1
        left_out += sum(map(len, possible)) - len(made)
        rows += [
            {
                "prompt": paths[0].prompt,
                "chosen": chosen,
                "rejected": rejected,
                "question_id": question.problem_id,
                "strategy": kind,
            }
            for kind, chosen, rejected in made
        ]
    summary = {
        "pairs": dict(Counter(row["strategy"] for row in rows)),
        "questions": len(questions),
        "questions_with_pairs": with_pairs,
        "without_pairs": dict(reasons),
        "paths": {kind: paths_seen[kind] for kind in ("right", "wrong", "unparsed", "truncated", "duplicate")},
        "left_out_by_cap": left_out,
    }
    return rows, summary


def _grade_paths(
    question: Question, paths: Sequence[ReasoningPath], style: PromptStyle, unlisted_is_wrong: bool
) -> dict[str, list[str]]:
    """Distinct outputs by kind: right, wrong, unparsed, truncated; ``duplicate`` holds the repeats."""
    graded: dict[str, list[str]] = {kind: [] for kind in ("right", "wrong", "unparsed", "truncated", "duplicate")}
    seen = set()
    for path in paths:
        if path.prompt != paths[0].prompt:
            raise bad_input("the paths of one question have different prompts", found=f"question {question.problem_id}")
        # White space at the end carries nothing; the eos of training follows the last word.
        text = path.output.rstrip()
        if text in seen:
            graded["duplicate"].append(text)
            continue
        seen.add(text)
        parsed = parse_output(text, question, **style.parse_settings("explain"))
        if path.truncated:
            kind = "truncated"
        elif parsed.failure:
            unlisted = (
                unlisted_is_wrong and parsed.failure == "no answer found" and _names_no_choice(text, question, style)
            )
            kind = "wrong" if unlisted else "unparsed"
        else:
            kind = "right" if grade_output(question, parsed) else "wrong"
        graded[kind].append(text)
    return graded


def _names_no_choice(text: str, question: Question, style: PromptStyle) -> bool:
    """Whether a path ends with its only answer line, and this holds neither a choice's text nor a choice's letter."""
    before, marker, answer = text.partition(style.answer_marker)
    answer = squeeze(answer)
    if question.is_numeric or not marker or not answer or squeeze(style.answer_marker) in answer:
        return False
    if "\n" in text[len(before) + len(marker) :].strip() or answer.lower() in question.letters:
        return False
    return not any(squeeze(choice) in answer for choice in question.choices)


def _pair_up(
    question: Question, graded: dict[str, list[str]], strategy: str, seed: int, style: PromptStyle
) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """All pairs (strategy, chosen, rejected) with the ground truth, and all of sampled paths, in the order of use."""
    draw = random.Random(f"{seed}:{question.problem_id}")
    right, wrong = list(graded["right"]), list(graded["wrong"])
    draw.shuffle(right)
    draw.shuffle(wrong)
    explained, sampled = [], []
    if strategy != "sampled" and question.explanation:
        truth = style.completion(question, "explain")
        explained = [("explanation", truth, text) for text in wrong]
    if strategy != "explanation":
        # Diagonals of the right x wrong table: every path is used before one is used twice.
        size = max(len(right), len(wrong))
        table = [(r, w) for r in range(len(right)) for w in range(len(wrong))]
        table.sort(key=lambda cell: (cell[1] - cell[0]) % size)
        sampled = [("sampled", right[r], wrong[w]) for r, w in table]
    return explained, sampled


def _capped(explained: list, sampled: list, cap: int) -> list:
    share = max(cap - cap // 2, cap - len(sampled))
    made = explained[:share]
    return made + sampled[: cap - len(made)]


def _why_none(question: Question, paths, graded: dict[str, list[str]], strategy: str) -> str:
    if not paths:
        return "no paths"
    if not graded["right"] and not graded["wrong"]:
        return "no path with a readable answer"
    if not graded["wrong"]:
        return "no wrong path"
    if strategy == "explanation":
        return "no explanation"
    return "no right path" if strategy == "sampled" else "no right path and no explanation"


def run_pairs(
    model: str | Path,
    questions: str | Path,
    out: str | Path,
    *,
    strategy: str = "both",
    num_paths: int = 8,
    max_per_question: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 1024,
    engine: str = "hf",
    style: PromptStyle | None = None,
    unlisted_is_wrong: bool = False,
    demonstrations: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict:
    """``medtrain pairs``: sample from a checkpoint, build pairs, write the JSONL file ``out``; returns the summary.

    Questions that need an image are left out and counted as ``skipped_image_questions``. Raises :class:`InputError`,
    with the summary, where not one pair came about.
    """
    everything = load_questions(questions, points_required=False)
    asked = [question for question in everything if question.text_only]
    if strategy not in STRATEGIES:
        raise bad_input("unknown", field="strategy", found=strategy, expected=", ".join(STRATEGIES))
    shots = load_questions(demonstrations, points_required=False) if demonstrations is not None else []
    loaded = load_engine(model, engine, device=device, dtype=dtype)
    paths = sample_paths(
        loaded,
        asked,
        num_paths=num_paths,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        style=style,
        demonstrations=shots,
    )
    rows, summary = build_pairs(
        asked,
        paths,
        strategy=strategy,
        max_per_question=max_per_question,
        seed=seed,
        style=style,
        unlisted_is_wrong=unlisted_is_wrong,
    )
    summary["skipped_image_questions"] = len(everything) - len(asked)
    if not rows:
        raise bad_input("no pair came about", file=questions, found=json.dumps(summary, ensure_ascii=False))
    write_atomically(out, to_jsonl(rows))
    return summary
