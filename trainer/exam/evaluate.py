"""Exam evaluation: a checkpoint sits an exam, answer only and with explanation, and ``exam.json`` says how it did.

The out folder holds ``run.json`` (what was asked of which model: another run is refused the folder), ``exam.json``, and
``outputs-MODE.jsonl`` (one row a question). While a mode runs, rows are appended to ``outputs-MODE.partial.jsonl``; a
run started again goes on from there.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from medtrain.trainer.data.chat import fix_time, now
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.choices import score_choices, summarize_choices
from medtrain.trainer.exam.generate import HFEngine, Output, VLLMEngine, load_engine
from medtrain.trainer.exam.parse import parse_output
from medtrain.trainer.exam.prompts import MODES, PromptStyle, load_style, model_positions, prompt_widths, read_demonstrations
from medtrain.trainer.exam.questions import Question, load_questions
from medtrain.trainer.exam.records import claim, end_last_line, file_digest, model_digest, rows_of
from medtrain.trainer.exam.scoring import INVALID, Graded, grade_output, summarize, to_jsonl, unread_note, write_atomically
from medtrain.trainer.intervals import bootstrap_interval, p_text, paired_p_value

METHODS = ("generate", "choice_logp")
Progress = Callable[[str, int, int], None]
# Questions whose choices are scored between two writings of rows.
_CHOICE_PORTION = 64


def answer_exam(
    model,
    tokenizer,
    questions: Sequence[Question],
    mode: str,
    style: PromptStyle | None = None,
    *,
    demonstrations: Sequence[Question] = (),
    max_new_tokens: int = 1024,
    method: str = "generate",
    batch_tokens: int = 65_536,
) -> list[dict]:
    """Let a model in memory sit an exam, greedily; one row a question, in their order (see :func:`exam_rows`).

    ``method`` ``choice_logp`` (answer mode only) generates nothing: the answer with the highest log-prob is the output
    (:mod:`medtrain.trainer.exam.choices`).
    """
    engine = HFEngine(model, tokenizer, batch_tokens=batch_tokens)
    style = style or PromptStyle()
    prompts = [style.prompt(question, mode, tokenizer, demonstrations) for question in questions]
    if method == "choice_logp":
        _check_method(method, (mode,), "hf")
        return _choice_rows(engine, questions, prompts, mode, style)
    outputs = engine.generate(prompts, max_new_tokens=max_new_tokens, stop=style.stop(mode))
    return exam_rows(questions, prompts, outputs, mode, style)


def _choice_rows(engine: HFEngine, questions, prompts, mode: str, style: PromptStyle) -> list[dict]:
    outputs, logps = score_choices(engine, questions, prompts, style)
    rows = exam_rows(questions, prompts, outputs, mode, style)
    return [row | {"choice_logps": one} for row, one in zip(rows, logps, strict=True)]


def exam_rows(
    questions: Sequence[Question], prompts: Sequence[str], outputs: Sequence[Output], mode: str, style: PromptStyle
) -> list[dict]:
    """Parse and score outputs, one row each.

    Fields: ``problem_id``, ``prompt``, ``output``, ``parsed``, ``correct``, ``points`` of ``max_points``, ``read_from``,
    ``failure`` (why no answer could be read, else null), ``truncated``.
    """
    rows = []
    for question, prompt, output in zip(questions, prompts, outputs, strict=True):
        parsed = parse_output(output.text, question, **style.parse_settings(mode))
        correct = grade_output(question, parsed)
        rows.append(
            {
                "problem_id": question.problem_id,
                "prompt": prompt,
                "output": output.text,
                "parsed": parsed.value,
                "correct": correct,
                "points": question.points if correct else 0,
                "max_points": question.points,
                "read_from": parsed.read_from,
                "failure": parsed.failure,
                "truncated": output.truncated,
            }
        )
    return rows


def summarize_rows(questions: Sequence[Question], rows: Sequence[dict], mode: str, style: PromptStyle) -> dict:
    """The figures of one mode in ``exam.json``: :func:`medtrain.trainer.exam.scoring.summarize` and ``truncated``.

    Where choices were scored by log-prob, also ``acc`` and ``acc_norm``.
    """
    graded = []
    for question, row in zip(questions, rows, strict=True):
        parsed = parse_output(row["output"], question, **style.parse_settings(mode))
        graded.append(Graded(question, parsed, grade_output(question, parsed)))
    result = summarize(graded) | {"truncated": sum(row["truncated"] for row in rows)}
    if rows and all("choice_logps" in row for row in rows):
        result |= summarize_choices(questions, [row["choice_logps"] for row in rows], style)
    return result


def evaluate(
    model_dir: str | Path,
    exam_path: str | Path,
    *,
    out: str | Path,
    mode: str = "both",
    engine: str = "hf",
    method: str = "generate",
    style: PromptStyle | None = None,
    demonstrations: str | Path | None = None,
    max_new_tokens: int = 1024,
    max_answer_tokens: int = 32,
    batch_tokens: int = 65_536,
    device: str = "auto",
    dtype: str = "auto",
    text_only: bool = True,
    limit: int | None = None,
    mapping: str | Path | None = None,
    progress: Progress | None = None,
    echo: Callable[[str], None] | None = None,
) -> dict:
    """Let the checkpoint in ``model_dir`` sit the exam in ``exam_path`` and write ``out``; returns ``exam.json``.

    ``mode`` is answer, explain or both; outputs already in ``out`` for the same model and settings are not made again.
    ``max_new_tokens`` bounds explain mode, ``max_answer_tokens`` answer mode. ``demonstrations`` is a JSONL file of
    worked questions, with explanations for explain mode. ``text_only`` leaves out questions that need an image, none of
    which is here; how many is said in ``skipped_image_questions``. ``limit`` takes the first so many of the rest.
    ``mapping`` is the YAML file for an exam of an own form (:func:`load_questions`). ``progress(mode, done, total)`` is
    called as outputs come in, ``echo`` with a line where the chat template writes a date: that of the first start, kept in
    ``run.json``. Raises :class:`InputError` for a user's mistake.
    """
    style = style or PromptStyle()
    modes = MODES if mode == "both" else (mode,)
    if not set(modes) <= set(MODES):
        raise bad_input("unknown", field="mode", found=mode, expected="answer, explain or both")
    _check_method(method, modes, engine)
    everything = load_questions(exam_path, mapping=mapping)
    if limit is not None and limit < 1:
        raise bad_input("must be 1 or more", field="limit", found=limit)
    questions = [q for q in everything if q.text_only or not text_only][:limit]
    if not questions:
        raise bad_input("no question is left to ask", file=exam_path, found=f"text_only {text_only}, limit {limit}")
    shots = read_demonstrations(demonstrations, everything, style, modes)
    new_tokens = {"answer": max_answer_tokens, "explain": max_new_tokens}
    digest = model_digest(model_dir)
    out = Path(out)
    recorded = _recorded(out)
    first_start = datetime.fromisoformat(recorded["first_start"]) if "first_start" in recorded else now()
    tokenizer = read_tokenizer(Path(model_dir))
    renderer = fix_time(tokenizer, first_start)
    if renderer is not tokenizer and style.chat and echo is not None:
        echo(f"the chat template writes a date: {first_start:%Y-%m-%d}, that of the first start")
    if method == "generate":
        positions = model_positions(model_dir)
        prompt_widths(style, questions, shots, renderer, {one: new_tokens[one] for one in modes}, positions, exam_path)
    else:  # a template that fails does so before anything is written
        for question in questions:
            style.prompt(question, mode, renderer, shots)
    identity = {
        "model": digest,
        "exam": file_digest(exam_path),
        "demonstrations": file_digest(demonstrations),
        "style": json.loads(json.dumps(asdict(style))),
        "engine": engine,
        "method": method,
        "dtype": dtype,
        "max_new_tokens": max_new_tokens,
        "max_answer_tokens": max_answer_tokens,
        "text_only": text_only,
        "limit": limit,
        "mapping": file_digest(mapping),
    }
    # A limit belongs to the outputs of its mode: where there are none it is free, where the mode is not sat now it stays.
    free, asked_before = set(), recorded.get("identity", {})
    for one, name in (("answer", "max_answer_tokens"), ("explain", "max_new_tokens")):
        with user_path(out):
            none = not any(out.glob(f"outputs-{one}.*"))
        if none:
            free.add(name)
        elif one not in modes and name in asked_before:
            identity[name] = asked_before[name]
    paths = {"model_path": str(model_dir), "exam_path": str(exam_path), "first_start": first_start.isoformat()}
    claim(out, identity, paths, free)
    loaded: list[tuple[HFEngine | VLLMEngine, dict]] = []

    def engine_when_needed() -> tuple[HFEngine | VLLMEngine, dict]:
        """The engine, and what is said in every row that it makes."""
        if not loaded:
            engine_loaded = load_engine(model_dir, engine, device=device, dtype=dtype, batch_tokens=batch_tokens)
            engine_loaded.tokenizer = fix_time(engine_loaded.tokenizer, first_start)
            marks = {}
            if isinstance(engine_loaded, HFEngine) and method == "generate":
                prompt = style.prompt(questions[0], modes[-1], engine_loaded.tokenizer, shots)
                if not engine_loaded.cache_agrees(prompt, new_tokens[modes[-1]]):
                    marks = {"invalid": INVALID}
            loaded.append((engine_loaded, marks))
        return loaded[0]

    path = out / "exam.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # A mode that was run before stays: the folder is this run's, so it was asked the same.
    results = {one: results[one] for one in MODES if one in results and (out / f"outputs-{one}.jsonl").is_file()}
    for one in modes:
        rows = _sit(engine_when_needed, questions, shots, one, style, method, new_tokens[one], out, progress)
        results[one] = summarize_rows(questions, rows, one, style)
    result = {one: results[one] for one in MODES if one in results}
    both = len(result) == len(MODES)
    result["explanation_gap"] = result["answer"]["points_ratio"] - result["explain"]["points_ratio"] if both else None
    if both:
        result |= _gap_figures([list(rows_of(out / f"outputs-{one}.jsonl")) for one in MODES], questions)
    written = (row for one in MODES for row in rows_of(out / f"outputs-{one}.jsonl"))
    if marked := next((row["invalid"] for row in written if "invalid" in row), None):
        result["invalid"] = marked
    result["questions_in_exam"] = len(everything)
    result["skipped_image_questions"] = sum(not q.text_only for q in everything) if text_only else 0
    result["settings"] = identity
    write_atomically(path, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    return result


def _recorded(out: Path) -> dict:
    """``run.json`` of the results in ``out``; nothing where there is none (:func:`claim` says what is wrong)."""
    try:
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("identity"), dict) else {}


def _gap_figures(rows_of_modes: list[list[dict]], questions: Sequence[Question]) -> dict:
    """95 % interval of the explanation gap, paired over the questions, and the exact p-value of there being none."""
    correct = [{row["problem_id"]: row["correct"] for row in rows} for rows in rows_of_modes]
    differences = [q.points * (correct[0][q.problem_id] - correct[1][q.problem_id]) for q in questions]
    low, high = bootstrap_interval(differences, [question.points for question in questions])
    return {"explanation_gap_low": low, "explanation_gap_high": high, "explanation_gap_p_value": paired_p_value(differences)}


def _sit(engine_when_needed, questions, shots, mode, style, method, max_new_tokens, out, progress) -> list[dict]:
    """Run one mode, going on from the rows that are there, write ``outputs-MODE.jsonl`` and return its rows."""
    final, partial = out / f"outputs-{mode}.jsonl", out / f"outputs-{mode}.partial.jsonl"
    done = {row["problem_id"]: row for row in itertools.chain(rows_of(final), rows_of(partial))}
    todo = [question for question in questions if question.problem_id not in done]

    def report() -> None:
        if progress is not None:
            progress(mode, sum(question.problem_id in done for question in questions), len(questions))

    report()
    if todo:
        engine, marks = engine_when_needed()
        prompts = [style.prompt(question, mode, engine.tokenizer, shots) for question in todo]
        end_last_line(partial)

        def keep(indices: list[int], outputs: list[Output]) -> None:
            add(exam_rows([todo[i] for i in indices], [prompts[i] for i in indices], outputs, mode, style))

        def add(rows: list[dict]) -> None:
            with open(partial, "a", encoding="utf-8") as file:
                file.write(to_jsonl(row | marks for row in rows))
            done.update((row["problem_id"], row | marks) for row in rows)
            report()

        if method == "choice_logp":
            for first in range(0, len(todo), _CHOICE_PORTION):
                some = slice(first, first + _CHOICE_PORTION)
                add(_choice_rows(engine, todo[some], prompts[some], mode, style))
        else:
            engine.generate(prompts, max_new_tokens=max_new_tokens, stop=style.stop(mode), on_outputs=keep)
    rows = [done[question.problem_id] for question in questions]
    outputs = [Output(row["output"], row["truncated"], 0) for row in rows]
    # Read again even where nothing was generated: the parser may have learnt since.
    again = exam_rows(questions, [row["prompt"] for row in rows], outputs, mode, style)
    rows = [
        new | {name: old[name] for name in ("choice_logps", "invalid") if name in old}
        for new, old in zip(again, rows, strict=True)
    ]
    write_atomically(final, to_jsonl(rows))
    partial.unlink(missing_ok=True)
    return rows


def _check_method(method: str, modes: Sequence[str], engine: str) -> None:
    if method not in METHODS:
        raise bad_input("unknown", field="method", found=method, expected=" or ".join(METHODS))
    if method == "choice_logp" and (tuple(modes) != ("answer",) or engine != "hf"):
        raise bad_input(
            "choice_logp scores answers without an explanation",
            field="method",
            found=method,
            expected="mode answer and engine hf with it",
        )


def run_eval(
    model: str | Path,
    exam: str | Path,
    out: str | Path,
    mode: str = "both",
    engine: str = "hf",
    demonstrations: str | Path | None = None,
    chat: bool = False,
    max_new_tokens: int = 1024,
    limit: int | None = None,
    images: bool = False,
    echo: Callable[[str], None] | None = None,
    *,
    prompt: str | Path | None = None,
    method: str = "generate",
    max_answer_tokens: int = 32,
    batch_tokens: int = 65_536,
    dtype: str = "auto",
    mapping: str | Path | None = None,
) -> dict:
    """``medtrain eval``: :func:`evaluate` with the prompt style of a name or file, reporting progress through ``echo``.

    ``chat`` uses the checkpoint's chat template (instruct models); ``images`` asks what needs an image too.
    """

    def progress(mode: str, done: int, total: int) -> None:
        if echo is not None:
            echo(f"{mode}: {done}/{total}")

    return evaluate(
        model,
        exam,
        out=out,
        mode=mode,
        engine=engine,
        method=method,
        style=load_style(prompt, chat=chat),
        demonstrations=demonstrations,
        max_new_tokens=max_new_tokens,
        max_answer_tokens=max_answer_tokens,
        batch_tokens=batch_tokens,
        dtype=dtype,
        text_only=not images,
        limit=limit,
        mapping=mapping,
        progress=progress,
        echo=echo,
    )


def as_text(result: dict) -> str:
    """``exam.json`` as a few lines for the screen."""
    lines = [f"{'':10}{'points':>14}{'share':>8}  {'95 %':16}{'right':>12}{'unread':>8}{'cut off':>9}{'forbidden':>11}"]
    for mode in (mode for mode in MODES if mode in result):
        row = result[mode]
        interval = f"[{row['points_ratio_low']:.3f}, {row['points_ratio_high']:.3f}]"
        points, right = f"{row['points']}/{row['max_points']}", f"{row['correct']}/{row['questions']}"
        lines.append(
            f"{mode:10}{points:>14}{row['points_ratio']:8.3f}  {interval:16}{right:>12}{row['parse_failures']:8}"
            f"{row['truncated']:9}{row['forbidden_choices']:11}"
        )
        if "acc_norm" in row:
            lines.append(f"{'':10}by choice log-prob: acc {row['acc']:.3f}, acc_norm {row['acc_norm']:.3f}")
    if result["explanation_gap"] is not None:
        lines.append(
            f"explanation gap (answer - explain) {result['explanation_gap']:+.3f}  95 % "
            f"[{result['explanation_gap_low']:+.3f}, {result['explanation_gap_high']:+.3f}]  "
            f"p {p_text(result['explanation_gap_p_value'])}"
        )
    for mode in (mode for mode in MODES if mode in result):
        lines += filter(None, [unread_note(mode, result[mode], f"outputs-{mode}.jsonl")])
    if "invalid" in result:
        lines.append(f"these figures are invalid: {result['invalid']}")
    if result["skipped_image_questions"]:
        lines.append(f"left out: {result['skipped_image_questions']} questions that need an image")
    return "\n".join(lines)
