"""Exam evaluation: a checkpoint answers an exam, with and without explanation, and ``exam.json`` holds the figures.

The out folder holds ``run.json`` (how its outputs are made), ``exam.json``, and ``outputs-MODE.jsonl`` (one row per question);
while a mode runs, ``outputs-MODE.partial.jsonl``, from which a run started again goes on.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medtrain.trainer.config.exam import EvalSettings
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.choices import score_choices, summarize_choices
from medtrain.trainer.exam.generate import HFEngine, Output, load_engine
from medtrain.trainer.exam.parse import parse_output
from medtrain.trainer.exam.prepare import TOKEN_LIMITS, Exam, model_digest, open_exam
from medtrain.trainer.exam.prompts import MODES, PromptStyle
from medtrain.trainer.exam.questions import Question
from medtrain.trainer.exam.scoring import INVALID, Row, scored, summarize, unread_note
from medtrain.trainer.files import append_jsonl, check_identity, read_jsonl, write_json, write_jsonl
from medtrain.trainer.intervals import bootstrap_interval, p_text, paired_p_value

log = logging.getLogger(__name__)


def evaluate(model: str | Path, exam_file: str | Path, out: str | Path, settings: EvalSettings) -> dict[str, Any]:
    """``medtrain eval``: let the checkpoint ``model`` answer the questions of ``exam_file``; returns ``exam.json``. Outputs that
    are in ``out`` are not made again. Raises :class:`InputError`, before anything is written unless the model does not load."""
    model, out = Path(model), Path(out)
    modes = MODES if settings.mode == "both" else (settings.mode,)
    generates = settings.method == "generate"
    if not generates and (modes != ("answer",) or settings.engine != "hf"):
        problem, expected = "choice_logp scores answers without an explanation", "mode answer and engine hf with it"
        raise bad_input(problem, field="method", found=settings.method, expected=expected)
    with user_path(out):
        recorded = json.loads((out / "run.json").read_bytes()) if (out / "run.json").is_file() else {}
    new_tokens = {mode: getattr(settings, TOKEN_LIMITS[mode]) if generates else 0 for mode in modes}
    exam, _ = open_exam(model, exam_file, settings, new_tokens, recorded, images=settings.images, limit=settings.limit)
    identity = {
        "model": model_digest(model),
        **exam.digests,
        "style": json.loads(json.dumps(asdict(exam.style))),
        "text_only": not settings.images,
    }
    names = ("engine", "method", "dtype", "max_new_tokens", "max_answer_tokens", "limit")
    identity |= {name: getattr(settings, name) for name in names}
    about = {"model_path": str(model), "exam_path": str(exam_file)}
    about |= {"first_start": exam.first_start} if exam.first_start is not None else {}
    _claim(out, identity, about, recorded.get("identity"), modes)

    @functools.cache
    def engine_and_marks():
        """The engine, loaded when it is first needed, and what every row that it makes is marked with."""
        engine = load_engine(model, settings)
        prompt, most = exam.prompts[modes[-1]][0], exam.new_tokens[modes[-1]]
        agrees = not generates or not isinstance(engine, HFEngine) or engine.cache_agrees(prompt, most)
        return engine, {} if agrees else {"invalid": INVALID}

    rows = {}
    for mode in MODES:
        if mode in modes:
            rows[mode] = _evaluate_mode(exam, mode, engine_and_marks, out, generates)
        elif stored := _stored(out / f"outputs-{mode}.jsonl"):  # of an earlier run in this folder
            rows[mode] = _grade(exam, mode, stored)
    result = _result(exam, rows)
    result["questions_in_exam"] = exam.num_in_file
    result["skipped_image_questions"] = 0 if settings.images else exam.num_with_image
    result["settings"] = identity
    write_json(out / "exam.json", result)
    return result


def _claim(
    out: Path, identity: dict[str, Any], about: dict[str, str], before: dict[str, Any] | None, modes: Sequence[str]
) -> None:
    """Make ``out`` this run's folder, or refuse it where it holds the results of another run. A token limit belongs to the
    outputs of its mode: without any it is free; of a mode that does not run now the recorded one stays, also in ``identity``."""
    holds = [mode for mode in MODES if any(out.glob(f"outputs-{mode}.*"))]
    identity |= {TOKEN_LIMITS[mode]: before[TOKEN_LIMITS[mode]] for mode in holds if before and mode not in modes}
    if occupied := bool(holds) or (out / "exam.json").exists():
        free = [TOKEN_LIMITS[mode] for mode in MODES if mode not in holds]
        check_identity(out, before, identity, occupied=True, expected="a new --out folder", free=free)
    if not occupied or before != identity:
        with user_path(out, "cannot be written"):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "run.json", {"identity": identity} | about)


def _stored(path: Path) -> dict[str, Row]:
    """The rows of an outputs file, by question; none without the file."""
    rows = read_jsonl(path, skip_broken=True) if path.is_file() else ()
    return {row["problem_id"]: row for _, row in rows}


def _evaluate_mode(
    exam: Exam, mode: str, engine_and_marks: Callable[[], tuple[Any, dict[str, str]]], out: Path, generates: bool
) -> list[Row]:
    """Run one mode, going on from the outputs that are there; write ``outputs-MODE.jsonl`` and return its rows."""
    final, partial = out / f"outputs-{mode}.jsonl", out / f"outputs-{mode}.partial.jsonl"
    stored = _stored(final) | _stored(partial)
    left = [i for i, question in enumerate(exam.questions) if question.problem_id not in stored]
    total = len(exam.questions)
    log.info(f"{mode}: {total - len(left)}/{total}")
    if left:
        engine, marks = engine_and_marks()
        questions, prompts = [exam.questions[i] for i in left], [exam.prompts[mode][i] for i in left]
        if generates:
            batches = engine.batches(prompts, exam.new_tokens[mode], exam.style.stop(mode))
        else:
            batches = score_choices(engine, questions, prompts, exam.style)
        for indices, outputs in batches:
            for i, output in zip(indices, outputs, strict=True):
                row = {"problem_id": questions[i].problem_id, "prompt": prompts[i], "output": output.text}
                row |= {"truncated": output.truncated} | marks
                row |= {} if output.choice_logps is None else {"choice_logps": output.choice_logps}
                stored[questions[i].problem_id] = row
            append_jsonl(partial, [stored[questions[i].problem_id] for i in indices])
            log.info(f"{mode}: {len(stored)}/{total}")
    rows = _grade(exam, mode, stored)
    write_jsonl(final, rows)
    partial.unlink(missing_ok=True)
    return rows


def _grade(exam: Exam, mode: str, stored: Mapping[str, Row]) -> list[Row]:
    """The rows of all questions, their outputs parsed anew: the parser may have improved since they were made."""
    rows = []
    for question in exam.questions:
        before = stored[question.problem_id]
        row = exam_row(exam.style, mode, question, before["prompt"], Output(before["output"], before["truncated"]))
        rows.append(row | {name: before[name] for name in ("choice_logps", "invalid") if name in before})
    return rows


def exam_row(style: PromptStyle, mode: str, question: Question, prompt: str, output: Output) -> Row:
    """A question's prompt and its output, parsed and scored."""
    parsed = parse_output(output.text, question, **style.parse_settings(mode))
    row = {"problem_id": question.problem_id, "prompt": prompt, "output": output.text}
    return row | scored(question, parsed) | {"truncated": output.truncated}


def _result(exam: Exam, rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The figures of each mode; of both, the explanation gap with its 95 % interval, paired over the questions, and the
    exact p-value of there being none."""
    result: dict[str, Any] = {}
    for mode, of_mode in rows.items():
        result[mode] = summarize(exam.questions, of_mode) | {"truncated": sum(row["truncated"] for row in of_mode)}
        if all("choice_logps" in row for row in of_mode):
            result[mode] |= summarize_choices(exam.questions, [row["choice_logps"] for row in of_mode], exam.style)
    result["explanation_gap"] = None
    if len(rows) == len(MODES):
        result["explanation_gap"] = result["answer"]["points_ratio"] - result["explain"]["points_ratio"]
        differences = [a["points"] - b["points"] for a, b in zip(rows["answer"], rows["explain"], strict=True)]
        low, high = bootstrap_interval(differences, [question.points for question in exam.questions])
        p_value = paired_p_value(differences)
        result |= {"explanation_gap_low": low, "explanation_gap_high": high, "explanation_gap_p_value": p_value}
    if any("invalid" in row for of_mode in rows.values() for row in of_mode):
        result["invalid"] = INVALID
    return result


def as_text(result: Mapping[str, Any]) -> str:
    """``exam.json`` as a few lines for the screen."""
    lines = [f"{'':10}{'points':>14}{'share':>8}  {'95 %':16}{'right':>12}{'unread':>8}{'cut off':>9}{'forbidden':>11}"]
    notes = []
    for mode in (mode for mode in MODES if mode in result):
        row = result[mode]
        interval = f"[{row['points_ratio_low']:.3f}, {row['points_ratio_high']:.3f}]"
        points, right = f"{row['points']}/{row['max_points']}", f"{row['correct']}/{row['questions']}"
        line = f"{mode:10}{points:>14}{row['points_ratio']:8.3f}  {interval:16}{right:>12}{row['parse_failures']:8}"
        lines.append(f"{line}{row['truncated']:9}{row['forbidden_choices']:11}")
        if "acc_norm" in row:
            lines.append(f"{'':10}by choice log-prob: acc {row['acc']:.3f}, acc_norm {row['acc_norm']:.3f}")
        notes += filter(None, [unread_note(mode, row, f"outputs-{mode}.jsonl")])
    if result["explanation_gap"] is not None:
        interval = f"[{result['explanation_gap_low']:+.3f}, {result['explanation_gap_high']:+.3f}]"
        p_value = p_text(result["explanation_gap_p_value"])
        lines.append(f"explanation gap (answer - explain) {result['explanation_gap']:+.3f}  95 % {interval}  p {p_value}")
    if "invalid" in result:
        notes.append(f"these figures are invalid: {result['invalid']}")
    if result["skipped_image_questions"]:
        notes.append(f"left out: {result['skipped_image_questions']} questions that need an image")
    return "\n".join(lines + notes)
