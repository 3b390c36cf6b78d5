"""Preference pairs for Reasoning Preference Optimization, from questions with answers and sampled reasoning paths.

Strategies: ``explanation`` prefers the ground-truth explanation with its answer line over the model's own wrong path;
``sampled`` prefers a right path over a wrong one (Pang et al., Iterative Reasoning Preference Optimization,
arXiv:2404.19733, section 2); ``both`` makes both kinds. Prompts are those of explain mode, and completions begin
exactly where generation begins, so that training scores what the model itself would write.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from medtrain.trainer.data.chat import fix_time, now
from medtrain.trainer.data.encode import opening
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.errors import bad_input
from medtrain.trainer.exam.generate import HFEngine, VLLMEngine, load_engine
from medtrain.trainer.exam.pairs.paths import (
    KINDS,
    GradedPath,
    PathFile,
    ReasoningPath,
    grade_paths,
    recorded_header,
    sample_into,
    sample_paths,
)
from medtrain.trainer.exam.parse import parse_output
from medtrain.trainer.exam.prompts import PromptStyle, model_positions, prompt_widths, read_demonstrations
from medtrain.trainer.exam.questions import Question, load_questions
from medtrain.trainer.exam.records import model_digest
from medtrain.trainer.exam.scoring import grade_output, to_jsonl, unread_note, write_atomically

__all__ = ["STRATEGIES", "ReasoningPath", "build_pairs", "run_pairs", "sample_paths"]

STRATEGIES = ("explanation", "sampled", "both")


@dataclass(frozen=True)
class _Pair:
    """A possible pair of one question: the places of its paths (None: the ground truth) and their texts."""

    strategy: str
    chosen: str
    rejected: str
    chosen_path: int | None
    rejected_path: GradedPath

    @property
    def longer(self) -> float:
        """Log of how many times as long, in characters, the chosen side is."""
        return math.log(max(1, len(self.chosen)) / max(1, len(self.rejected)))


def build_pairs(
    questions: Sequence[Question],
    paths_by_question: Mapping[str, Sequence[ReasoningPath]],
    *,
    strategy: str = "both",
    max_per_question: int = 8,
    balance_length: bool = False,
    seed: int = 0,
    style: PromptStyle | None = None,
    unlisted_is_wrong: bool = False,
    min_explanation: int = 1,
) -> tuple[list[dict], dict]:
    """Grade paths and pair them up.

    Returns rows ``{prompt, chosen, rejected, question_id, strategy, provenance}`` in the order of the questions, at most
    ``max_per_question`` each (an even share of both kinds under ``both``, as far as there are enough), drawn by
    ``seed`` and question id alone; and a summary: ``pairs`` (by strategy), ``questions``, ``questions_with_pairs``,
    ``without_pairs`` (reason -> questions), ``paths`` (right, bare, wrong, unparsed, truncated, duplicate),
    ``left_out_by_cap``, ``duplicate_pairs`` (the same texts from another question) and ``lengths``.

    ``balance_length``: of the pairs that the cap leaves to choose from, those are taken that keep the sum of
    log(chosen length / rejected length) over all rows nearest to 0, so that length tells less which side is chosen.
    Every path is still used before one is used twice. ``lengths`` (characters) compares the rows with those of the draw
    alone; where the cap leaves no choice, the two are the same.

    A right path that is ``bare``, with less than ``min_explanation`` letters and digits beside its answer, is not chosen:
    preferring it would teach the model to leave the explanation out.
    A path that was cut off is neither chosen nor rejected, for training would put an eos where the model never ended.
    Nor is one whose answer cannot be read: that it is wrong would be a guess. Where the style has the text of a choice
    as the answer, ``unlisted_is_wrong`` counts it as wrong if it ends with one answer line and that names no choice at
    all: a model that answers another question than the one asked writes such paths, and they are worth preferring
    against. The exam's own score does not depend on this. A ground truth that the parser does not read as the right
    answer is not used.
    """
    style = style or PromptStyle()
    _check(strategy, max_per_question, style, unlisted_is_wrong)
    rows: list[dict] = []
    drawn: list[tuple[int, int]] = []
    taken: list[_Pair] = []
    seen: set[tuple[str, str, str]] = set()
    paths_seen, reasons, left_out, with_pairs, repeated = Counter(), Counter(), 0, 0, 0
    longer, made_so_far = 0.0, Counter()
    for question in questions:
        paths = paths_by_question.get(question.problem_id, ())
        graded = grade_paths(question, paths, style, unlisted_is_wrong, min_explanation)
        paths_seen.update(path.kind for path in graded)
        truth = _ground_truth(question, style) if strategy != "sampled" else None
        possible = _pair_up(question, graded, truth, strategy, seed)
        made = _capped(*possible, max_per_question, made_so_far)
        made_so_far.update(pair.strategy for pair in made)
        if not made:
            reasons[_why_none(question, graded, truth, strategy)] += 1
            continue
        drawn += [(len(pair.chosen), len(pair.rejected)) for pair in made]
        if balance_length:
            made = _balanced(possible, Counter(pair.strategy for pair in made), longer)
        left_out += sum(map(len, possible)) - len(made)
        before = len(rows)
        for pair in made:
            key = (paths[0].prompt, pair.chosen, pair.rejected)
            if key in seen:
                repeated += 1
                continue
            seen.add(key)
            longer += pair.longer
            taken.append(pair)
            rows.append(_row(question, paths[0].prompt, pair))
        if len(rows) == before:
            reasons["the same pairs as another question"] += 1
        else:
            with_pairs += 1
    summary = {
        "pairs": dict(Counter(row["strategy"] for row in rows)),
        "questions": len(questions),
        "questions_with_pairs": with_pairs,
        "without_pairs": dict(reasons),
        "paths": {kind: paths_seen[kind] for kind in KINDS},
        "left_out_by_cap": left_out,
        "duplicate_pairs": repeated,
        "lengths": {
            "balanced": balance_length,
            "drawn": _lengths(drawn),
            "written": _lengths([(len(pair.chosen), len(pair.rejected)) for pair in taken]),
        },
    }
    return rows, summary


def _check(strategy: str, max_per_question: int, style: PromptStyle, unlisted_is_wrong: bool) -> None:
    if strategy not in STRATEGIES:
        raise bad_input("unknown", field="strategy", found=strategy, expected=", ".join(STRATEGIES))
    if max_per_question < 1:
        raise bad_input("must be 1 or more", field="max_per_question", found=max_per_question)
    if unlisted_is_wrong and style.answer_as != "text":
        raise bad_input(
            "needs answers that are texts of choices", field="unlisted_is_wrong", expected="a prompt style with answer_as: text"
        )


def _row(question: Question, prompt: str, pair: _Pair) -> dict:
    return {
        "prompt": prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "question_id": question.problem_id,
        "strategy": pair.strategy,
        "provenance": {
            "chosen_path": pair.chosen_path,
            "rejected_path": pair.rejected_path.index,
            "rejected_answer": pair.rejected_path.parsed.value,
        },
    }


def _lengths(sides: Sequence[tuple[int, int]]) -> dict:
    """Mean characters of both sides, and the share of pairs whose chosen side is the longer one (equal: half)."""
    if not sides:
        return {"mean_chosen": None, "mean_rejected": None, "chosen_longer": None}
    return {
        "mean_chosen": sum(chosen for chosen, _ in sides) / len(sides),
        "mean_rejected": sum(rejected for _, rejected in sides) / len(sides),
        "chosen_longer": sum((c > r) + (c == r) / 2 for c, r in sides) / len(sides),
    }


def _ground_truth(question: Question, style: PromptStyle) -> str | None:
    """The ground-truth completion, if the question has an explanation and the parser reads it as right."""
    if not (question.explanation or "").strip():
        return None
    truth = style.completion(question, "explain")
    return truth if grade_output(question, parse_output(truth, question, **style.parse_settings("explain"))) else None


def _pair_up(
    question: Question, graded: Sequence[GradedPath], truth: str | None, strategy: str, seed: int
) -> tuple[list[_Pair], list[_Pair]]:
    """All pairs with the ground truth, and all of sampled paths, in the order of use."""
    draw = random.Random(f"{seed}:{question.problem_id}")
    right = [path for path in graded if path.kind in ("right", "bare")]
    wrong = [path for path in graded if path.kind == "wrong"]
    draw.shuffle(right)
    draw.shuffle(wrong)
    right = [path for path in right if path.kind == "right"]  # after the draw, so that min_explanation changes no other
    explained = [_Pair("explanation", truth, path.text, None, path) for path in wrong] if truth is not None else []
    sampled = []
    if strategy != "explanation":
        # Diagonals of the right x wrong table: every path is used before one is used twice.
        size = max(len(right), len(wrong))
        table = [(r, w) for r in range(len(right)) for w in range(len(wrong))]
        table.sort(key=lambda cell: (cell[1] - cell[0]) % size)
        sampled = [_Pair("sampled", right[r].text, wrong[w].text, right[r].index, wrong[w]) for r, w in table]
    return explained, sampled


def _capped(explained: list[_Pair], sampled: list[_Pair], cap: int, so_far: Counter) -> list[_Pair]:
    """Half of the cap for each kind, as far as there are pairs; an odd one for the kind that has had fewer ``so_far``."""
    odd = cap % 2 and so_far["explanation"] <= so_far["sampled"]
    share = max(cap // 2 + odd, cap - len(sampled))
    made = explained[:share]
    return made + sampled[: cap - len(made)]


def _balanced(possible: Sequence[list[_Pair]], counts: Mapping[str, int], longer: float) -> list[_Pair]:
    """As many pairs of each kind as ``counts`` says, each the one that takes the running sum ``longer`` nearest to 0."""
    made: list[_Pair] = []
    for pairs in possible:
        left, uses = list(pairs), Counter()
        for _ in range(counts.get(pairs[0].strategy, 0) if pairs else 0):
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


def run_pairs(
    model: str | Path,
    questions: str | Path,
    out: str | Path,
    *,
    strategy: str = "both",
    num_paths: int = 8,
    max_per_question: int = 8,
    balance_length: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 1024,
    engine: str = "hf",
    style: PromptStyle | None = None,
    unlisted_is_wrong: bool = False,
    min_explanation: int = 1,
    demonstrations: str | Path | None = None,
    mapping: str | Path | None = None,
    batch_tokens: int = 65_536,
    device: str = "auto",
    dtype: str = "auto",
    echo: Callable[[str], None] | None = None,
) -> dict:
    """``medtrain pairs``: sample from a checkpoint, build pairs, write the JSONL file ``out``; returns the summary.

    Beside ``out`` (pairs.jsonl) stand pairs.paths.jsonl with every path and its grade, from which a run that was killed
    goes on and pairs of another strategy are made without sampling again, and pairs.summary.json. Questions that
    need an image are left out and counted as ``skipped_image_questions``. Raises :class:`InputError` before anything is
    sampled where ``strategy`` needs explanations and there is none, and after the paths were written where not one pair
    came about; ``out`` is then left as it was.
    """
    style, out = style or PromptStyle(), Path(out)
    _check(strategy, max_per_question, style, unlisted_is_wrong)
    everything = load_questions(questions, points_required=False, mapping=mapping)
    asked = [question for question in everything if question.text_only]
    if not asked:
        raise bad_input("no question is left to ask: all need an image", file=questions)
    shots = read_demonstrations(demonstrations, everything, style, ("explain",))
    _check_explanations(asked, questions, strategy, style, echo)
    stem = out.name.removesuffix(".jsonl")
    path = out.with_name(f"{stem}.paths.jsonl")
    tokenizer = read_tokenizer(Path(model))
    first_start = datetime.fromisoformat(recorded_header(path).get("first_start") or now().isoformat())
    renderer = fix_time(tokenizer, first_start)
    # Its batches have random numbers of their own, but whoever runs out of memory must be able to go on with smaller ones.
    about = {"batch_tokens": batch_tokens} if engine == "hf" else {}
    if style.chat and renderer is not tokenizer:
        about["first_start"] = first_start.isoformat()
        if echo is not None:
            echo(f"the chat template writes a date: {first_start:%Y-%m-%d}, that of the first start")
    prompt_widths(style, asked, shots, renderer, {"explain": max_new_tokens}, model_positions(model), questions)
    prompts = {question.problem_id: style.prompt(question, "explain", renderer, shots) for question in asked}
    before, _ = opening(tokenizer)
    if style.chat and echo is not None and not all(prompt.startswith(before) for prompt in prompts.values()):
        echo(
            f"note: the chat template writes no {before}, which the tokenizer puts before every text: paths are sampled "
            "without it, and training on these pairs, which are strings, puts it"
        )
    sampling = {
        "model": model_digest(model),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "style": asdict(style),
        "engine": engine,
        "dtype": dtype,
        "num_paths": num_paths,
        "temperature": temperature,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
    }
    file = PathFile(path, sampling, about)
    if out.exists() and not file.path.exists():
        raise bad_input("is there already, and no paths from which it was made", file=out, expected="another out")

    def load() -> HFEngine | VLLMEngine:
        loaded = load_engine(model, engine, device=device, dtype=dtype, batch_tokens=batch_tokens)
        loaded.tokenizer = fix_time(loaded.tokenizer, first_start)
        return loaded

    sample_into(
        file,
        load,
        asked,
        num_paths=num_paths,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        style=style,
        demonstrations=shots,
        echo=echo,
    )
    paths = {
        i: [ReasoningPath(prompt, file.outputs[i, k].text, file.outputs[i, k].truncated) for k in range(num_paths)]
        for i, prompt in prompts.items()
    }
    graded = {q.problem_id: grade_paths(q, paths[q.problem_id], style, unlisted_is_wrong, min_explanation) for q in asked}
    file.write_graded(graded)
    rows, summary = build_pairs(
        asked,
        paths,
        strategy=strategy,
        max_per_question=max_per_question,
        balance_length=balance_length,
        seed=seed,
        style=style,
        unlisted_is_wrong=unlisted_is_wrong,
        min_explanation=min_explanation,
    )
    source = {
        "model": str(model),
        "model_digest": sampling["model"],
        "questions": str(questions),
        "temperature": temperature,
        "seed": seed,
    }
    for row in rows:
        row["provenance"] |= source
    summary["skipped_image_questions"] = len(everything) - len(asked)
    summary["files"] = {"pairs": str(out) if rows else None, "paths": str(file.path)}
    summary["settings"] = {
        "strategy": strategy,
        "max_per_question": max_per_question,
        "min_explanation": min_explanation,
        "sampling": sampling | about,
    }
    totals = {
        "questions": len(asked) * num_paths,
        "parse_failures": sum(path.parsed.failure is not None for of_one in graded.values() for path in of_one),
        "truncated": sum(path.truncated for of_one in paths.values() for path in of_one),
    }
    if echo is not None and (note := unread_note("paths", totals, file.path)):
        echo(note)
    if rows or not out.exists():  # pairs of another strategy stay, with their summary
        write_atomically(out.with_name(f"{stem}.summary.json"), json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    if not rows:
        why = ", ".join(f"{reason}: {count}" for reason, count in summary["without_pairs"].items())
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary["paths"].items() if count)
        raise bad_input(
            f"no pair came about from {len(asked)} questions ({why}; paths: {kinds}); see {file.path}, "
            f"for example the path {_example(graded)[:120]!r}",
            file=questions,
        )
    write_atomically(out, to_jsonl(rows))
    return summary


def _check_explanations(
    asked: Sequence[Question], file: str | Path, strategy: str, style: PromptStyle, echo: Callable[[str], None] | None
) -> None:
    """Say how many questions have a ground truth to prefer; refuse where the strategy has no other and there is none."""
    if strategy == "sampled":
        return
    usable = sum(_ground_truth(question, style) is not None for question in asked)
    given = sum(bool((question.explanation or "").strip()) for question in asked)
    if echo is not None:
        unread = f"; {given - usable} more are not read as the right answer" if given > usable else ""
        echo(f"explanations: {usable} of {len(asked)} questions have one{unread}")
    if not usable and strategy == "explanation":
        problem = "no explanation is read as the right answer" if given else "no question has an explanation"
        raise bad_input(problem, file=file, field="explanation", expected="explanations, or strategy=sampled")


def _example(graded: Mapping[str, Sequence[GradedPath]]) -> str:
    """A path of the commonest kind that is of no use, one with a text where there is one."""
    useless = [path for paths in graded.values() for path in paths if path.kind not in ("right", "duplicate")]
    counts = Counter(path.kind for path in useless)
    useless = useless or [path for paths in graded.values() for path in paths]
    return max(useless, key=lambda path: (bool(path.text), counts[path.kind])).text if useless else ""
