"""``medtrain pairs``: sample reasoning paths from a checkpoint in explain mode, keep and grade them, and write pairs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medtrain.trainer.config.exam import PairsConfig
from medtrain.trainer.data.tokenizer import opening
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.generate import HFEngine, Output, load_engine
from medtrain.trainer.exam.pairs.build import build_pairs, grade_paths, ground_truth
from medtrain.trainer.exam.prepare import Exam, model_digest, open_exam
from medtrain.trainer.exam.scoring import INVALID, unread_note
from medtrain.trainer.files import append_jsonl, check_identity, read_jsonl, write_json, write_jsonl

log = logging.getLogger(__name__)

Outputs = dict[tuple[str, int], Output]  # of paths, by question and number


def run_pairs(config: PairsConfig) -> dict[str, Any]:
    """Sample, build pairs and write the JSONL file ``config.out``; returns the summary. Next to pairs.jsonl stand
    pairs.paths.jsonl with every path and its grade, from which a run that was killed goes on and pairs of another strategy
    are made without sampling again, and pairs.summary.json. Raises :class:`InputError` for a user's mistake, before anything is
    sampled; where not one pair came about, after the paths were written: ``config.out`` is then left as it was."""
    out, model = Path(config.out), Path(config.model)
    stem = out.name.removesuffix(".jsonl")
    paths_file = out.with_name(f"{stem}.paths.jsonl")
    recorded, outputs = _read_paths(paths_file)
    new_tokens = {"explain": config.max_new_tokens}
    exam, tokenizer = open_exam(model, config.questions, config, new_tokens, recorded or {}, scored=False)
    if config.unlisted_is_wrong and exam.style.answer_as != "text":
        problem, expected = "needs answers that are texts of choices", "a prompt style with answer_as: text"
        raise bad_input(problem, field="unlisted_is_wrong", expected=expected)
    _check_explanations(exam, config)
    before, _ = opening(tokenizer)
    if exam.style.chat and not all(prompt.startswith(before) for prompt in exam.prompts["explain"]):
        why = f"note: the chat template writes no {before}, which the tokenizer puts before every text"
        log.info(f"{why}: paths are sampled without it, and training on these pairs, which are strings, puts it")
    prompts = dict(zip((question.problem_id for question in exam.questions), exam.prompts["explain"], strict=True))
    prompts_digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    identity = {"model": model_digest(model), "prompts": prompts_digest, "style": asdict(exam.style)}
    names = ("engine", "dtype", "num_paths", "temperature", "seed", "max_new_tokens")
    identity |= {name: getattr(config, name) for name in names}
    advice = "another out, or this file moved away"
    check_identity(paths_file, recorded, identity, occupied=paths_file.exists(), expected=advice)
    if out.exists() and not paths_file.exists():
        raise bad_input("is there already, and no paths from which it was made", file=out, expected="another out")
    # Its batches have random numbers of their own, but whoever runs out of memory must be able to go on with smaller ones.
    uncompared: dict[str, Any] = {"batch_tokens": config.batch_tokens} if config.engine == "hf" else {}
    uncompared |= {"first_start": exam.first_start} if exam.first_start is not None else {}
    header = {"sampling": identity | uncompared}
    _sample_missing(outputs, exam, config, paths_file, header)
    graded = {}
    for question in exam.questions:
        of_question = [outputs[question.problem_id, k] for k in range(config.num_paths)]
        graded[question.problem_id] = grade_paths(question, of_question, exam.style, config)
    paths = [path for of_question in graded.values() for path in of_question]
    write_jsonl(paths_file, [header, *paths])
    counts = {"questions": len(paths), "truncated": sum(path["truncated"] for path in paths)}
    counts["parse_failures"] = sum(path["failure"] is not None for path in paths)
    if note := unread_note("paths", counts, paths_file):
        log.info(note)
    rows, summary = build_pairs(exam.questions, exam.prompts["explain"], graded, exam.style, config)
    for row in rows:
        row["provenance"] |= {"model": config.model, "model_digest": identity["model"], "questions": config.questions}
        row["provenance"] |= {"temperature": config.temperature, "seed": config.seed}
    summary["skipped_image_questions"] = exam.num_with_image
    summary["files"] = {"pairs": config.out if rows else None, "paths": str(paths_file)}
    summary["settings"] = {name: getattr(config, name) for name in ("strategy", "max_per_question", "min_explanation")} | header
    if rows or not out.exists():  # pairs of another strategy stay, with their summary
        write_json(out.with_name(f"{stem}.summary.json"), summary)
    if not rows:
        why = ", ".join(f"{reason}: {count}" for reason, count in summary["without_pairs"].items())
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary["paths"].items() if count)
        useless = (path["output"].rstrip() for path in paths if path["kind"] not in ("right", "duplicate"))
        example = next(filter(None, useless), "")[:120]
        problem = f"no pair came about from {len(exam.questions)} questions ({why}; paths: {kinds})"
        raise bad_input(f"{problem}; see {paths_file}, for example the path {example!r}", file=config.questions)
    write_jsonl(out, rows)
    return summary


def _check_explanations(exam: Exam, config: PairsConfig) -> None:
    """Log how many questions have a ground truth to prefer; refuse where the strategy has no other and there is none."""
    if config.strategy == "sampled":
        return
    usable = sum(ground_truth(question, exam.style) is not None for question in exam.questions)
    given = sum(bool((question.explanation or "").strip()) for question in exam.questions)
    unread = f"; {given - usable} more are not read as the right answer" if given > usable else ""
    log.info(f"explanations: {usable} of {len(exam.questions)} questions have one{unread}")
    if not usable and config.strategy == "explanation":
        problem = "no explanation is read as the right answer" if given else "no question has an explanation"
        raise bad_input(problem, file=config.questions, field="explanation", expected="explanations, or strategy=sampled")


def _read_paths(file: Path) -> tuple[dict[str, Any] | None, Outputs]:
    """How the paths of ``file`` were sampled, None where it does not tell or is not there, and its paths."""
    rows = [row for _, row in read_jsonl(file, skip_broken=True)] if file.is_file() else []
    sampling = next((row["sampling"] for row in rows if isinstance(row.get("sampling"), dict)), None)
    paths = [row for row in rows if {"problem_id", "path", "output", "truncated"} <= row.keys()]
    return sampling, {(row["problem_id"], row["path"]): Output(row["output"], row["truncated"]) for row in paths}


def _sample_missing(outputs: Outputs, exam: Exam, config: PairsConfig, file: Path, header: Mapping[str, Any]) -> None:
    """Sample the paths that ``outputs`` lacks into it, and into ``file``, which begins with ``header``; with nothing to do,
    load nothing. Raises :class:`InputError` for a model whose KV cache does not work."""
    wanted = [(question.problem_id, i) for question in exam.questions for i in range(config.num_paths)]
    known = {number for number, path in enumerate(wanted) if path in outputs}
    log.info(f"paths: {len(known)}/{len(wanted)}")
    if len(known) == len(wanted):
        return
    engine = load_engine(Path(config.model), config)
    prompts, new_tokens, stop = exam.prompts["explain"], exam.new_tokens["explain"], exam.style.stop("explain")
    if isinstance(engine, HFEngine) and not engine.cache_agrees(prompts[0], new_tokens):
        raise bad_input(f"nothing was sampled: {INVALID}", file=file)
    if not file.is_file():
        with user_path(file, "cannot be written"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(file, [header])
    repeated = [prompt for prompt in prompts for _ in range(config.num_paths)]
    sampling: dict[str, Any] = {"temperature": config.temperature, "seed": config.seed, "skip": known}
    for numbers, made in engine.batches(repeated, new_tokens, stop, **sampling):
        # Of a batch that held some paths of an earlier start, those stay as they are.
        new = {wanted[number]: output for number, output in zip(numbers, made, strict=True) if number not in known}
        names = ("problem_id", "path", "output", "truncated")
        append_jsonl(file, [dict(zip(names, (*path, one.text, one.truncated), strict=True)) for path, one in new.items()])
        outputs |= new
        log.info(f"paths: {len(outputs)}/{len(wanted)}")
