"""The demo over several seeds: does an exam score fall when the model must explain itself, and what takes the fall away?

Each seed is another world, model and examination, so the intervals over seeds hold for the recipe in this kind of world,
where the demo's own hold for one world's questions.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path

import torch

from medtrain.trainer.demo.recipe import RECIPE, Recipe
from medtrain.trainer.demo.run import EXTRA_ARMS, NUM_THREADS, Demo, run_demo
from medtrain.trainer.demo.table import LABELS, draw_bars
from medtrain.trainer.demo.texts import STYLE
from medtrain.trainer.demo.world import RELATIONS, World, make_world
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.files import check_can_make, write_json
from medtrain.trainer.processes import clean_context
from medtrain.trainer.run.console import console_logging
from medtrain.trainer.run.folder import commit, device_name, versions

log = logging.getLogger(__name__)

# Student's t at 97.5 % by degrees of freedom; beyond the list the normal distribution is near enough.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
CONTRASTS = (("cpt_rpo", "cpt"), ("rpo", "base"), ("cpt_rpo", "cpt_sft"), ("cpt_rpo", "cpt_dpo"))
SCORES = ("answer", "explain", "gap", "stated")


def summarize(values: list[float]) -> dict[str, float]:
    """Mean and 95 % t interval of the mean over seeds; one seed has no interval."""
    mean, half = statistics.fmean(values), 0.0
    if (freedom := len(values) - 1) > 0:
        t = _T[freedom - 1] if freedom <= len(_T) else 1.96
        half = t * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def states_fact(world: World, prompt: str, output: str) -> bool:
    """Whether an explanation tells of the disease asked about what is right for it, wherever the answer came from."""
    about = prompt.removeprefix("問題:")
    disease, word = about[:2], about[3:].removeprefix("の").split("はどれか", 1)[0]
    (r,) = [i for i, relation in enumerate(RELATIONS) if relation.word == word]
    # The textbook's style leaves the relation out where it names the second disease.
    fact = rf"{disease}病(の|では|なら)({word}は)?{world.facts[disease, r]}"
    return re.search(fact, output.split(STYLE.answer_marker, 1)[0]) is not None


def scores(demo: Demo, arm: str, row: dict, kind: str = "test") -> dict[str, float]:
    """An arm's numbers in one world: the shares of points in its ``row`` of the demo's table, and the share of its
    explanations that state the fact asked for, as the score alone does not tell where an answer is from."""
    world = make_world(demo.seed, demo.recipe.sizes)
    outputs = demo.outputs(arm, kind, "explain")
    stated = statistics.fmean(states_fact(world, output["prompt"], output["output"]) for output in outputs)
    answer, explain = row["answer"]["points_ratio"], row["explain"]["points_ratio"]
    return {"answer": answer, "explain": explain, "gap": row["gap"], "stated": stated}


def about(recipe: Recipe) -> dict:
    """What computed a result of the demo."""
    return {
        "device": device_name(torch.device("cpu")),
        "threads": NUM_THREADS,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "recipe": dataclasses.asdict(recipe),
    }


def result(
    worlds: dict[int, dict[str, dict[str, float]]], seconds: list[float], questions: int, recipe: Recipe = RECIPE, jobs: int = 1
) -> dict:
    """The JSON of all seeds, from ``worlds`` (seed -> arm -> :func:`scores`): the arms, and arms against one another, seed by
    seed."""
    arms = list(next(iter(worlds.values())))
    contrasts = [*CONTRASTS, *(("cpt_rpo", arm) for arm in EXTRA_ARMS if arm in arms)]
    return about(recipe) | {
        "seeds": list(worlds),
        "seconds": seconds,
        "jobs": jobs,  # worlds at a time, that shared the machine
        "interval": "95 % t interval of the mean over seeds",
        "questions": questions,
        "arms": {
            arm: {name: summarize([world[arm][name] for world in worlds.values()]) for name in SCORES}
            | {"by_seed": [world[arm] for world in worlds.values()]}
            for arm in arms
        },
        "contrasts": {
            f"{one} - {other}": {
                name: summarize([world[one][name] - world[other][name] for world in worlds.values()]) for name in SCORES
            }
            for one, other in contrasts
        },
    }


def run_seeds(
    out: Path | str,
    first_seed: int,
    num_seeds: int,
    *,
    quiet: bool = False,
    recipe: Recipe = RECIPE,
    extra_arms: Sequence[str] = (),
    jobs: int = 1,
) -> dict:
    """Run the demo of each seed in ``OUT/seed-N``, as far as it is not there yet; returns what ``OUT/four-arms.json`` holds.

    ``jobs`` seeds run at the same time, a process each; it changes no number. ``extra_arms``: as of ``run_demo``. Prints the
    table over seeds and writes ``four-arms.json`` and ``four-arms.png``. Raises :class:`InputError` where ``out`` holds a
    demo of one seed, or one of its folders something else than a demo of that seed.
    """
    out = Path(out)
    check_can_make(out)
    with user_path(out):
        is_demo = (out / "demo.json").exists()
    if is_demo:
        raise bad_input("holds a demo of one seed", file=out, expected="another --out folder")
    demos = [Demo(out / f"seed-{seed}", seed, recipe) for seed in range(first_seed, first_seed + num_seeds)]
    if jobs > 1:
        with console_logging(enabled=not quiet, name=__name__):
            _run_in_parallel(demos, extra_arms, jobs)
    worlds, questions = {}, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)  # as each demo does, and so that the result names what was used
    try:
        for demo in demos:
            table = run_demo(demo.out, demo.seed, quiet or jobs > 1, recipe, extra_arms)
            worlds[demo.seed] = {arm: scores(demo, arm, row) for arm, row in table.items()}
            questions = table["base"]["answer"]["questions"]
        found = result(worlds, [_seconds(demo) for demo in demos], questions, recipe, jobs)
    finally:
        torch.set_num_threads(threads)
    path = out / "four-arms.json"
    write_json(path, found)
    bars = {
        arm: {mode: (row[mode]["mean"], row[mode]["low"], row[mode]["high"]) for mode in ("answer", "explain")}
        for arm, row in found["arms"].items()
    }
    draw_bars(
        bars,
        path.with_suffix(".png"),
        title=f"Exam with and without explanation, made-up medicine, mean of {num_seeds} seeds",
        note=f"{num_seeds} seeds of {found['questions']} questions; lines: {found['interval']}",
    )
    if not quiet:
        print(f"\n{format_result(found)}\n\ntable: {path}   picture: {path.with_suffix('.png')}", flush=True)
    return found


def _run_in_parallel(demos: Sequence[Demo], extra_arms: Sequence[str], jobs: int) -> None:
    """Run the demos, ``jobs`` at a time; the first that fails ends it, what the others have done stays."""
    log.info(f"{len(demos)} worlds, {jobs} at a time, in {demos[0].out.parent}")
    with ProcessPoolExecutor(min(jobs, len(demos)), mp_context=clean_context(__name__)) as pool:
        begun = {pool.submit(run_demo, demo.out, demo.seed, True, demo.recipe, extra_arms): demo for demo in demos}
        try:
            for finished in as_completed(begun):
                demo, table = begun[finished], finished.result()
                gaps = f"gap of CPT {table['cpt']['gap']:+.3f}, of CPT + RPO {table['cpt_rpo']['gap']:+.3f}"
                log.info(f"seed {demo.seed}: {gaps}, {_seconds(demo):.0f} s")
        except BaseException as error:
            log.info(f"ends ({type(error).__name__}) when the worlds under way are done")
            pool.shutdown(cancel_futures=True)
            raise


def _seconds(demo: Demo) -> float:
    """What the stages of one demo took, in whichever of its runs."""
    return round(sum(json.loads((demo.out / "times.json").read_text(encoding="utf-8")).values()), 1)


def format_result(found: dict) -> str:
    """The JSON as a table of text: mean [low, high]; of one arm less another, seed by seed."""

    def cells(row: dict, signs: dict[str, str]) -> str:
        texts = [
            f"{row[name]['mean']:{s}.3f} [{row[name]['low']:{s}.3f}, {row[name]['high']:{s}.3f}]" for name, s in signs.items()
        ]
        return "".join(f"{text:26}" for text in texts).rstrip()

    lines = [f"{len(found['seeds'])} seeds, {found['interval']}", f"{'':22}{'answer':26}{'explain':26}{'gap':26}fact stated"]
    for arm, row in found["arms"].items():
        lines.append(f"{LABELS[arm]:22}{cells(row, dict.fromkeys(SCORES, '') | {'gap': '+'})}")
    lines.append("one arm less another, seed by seed:")
    for name, row in found["contrasts"].items():
        lines.append(f"{name:22}{cells(row, dict.fromkeys(SCORES, '+'))}")
    return "\n".join(lines)
