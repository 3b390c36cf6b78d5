"""The demo over several seeds: does an exam score fall when the model must explain itself, and what takes the fall away?

Each seed is another world, model and examination, so the intervals over seeds hold for the recipe in this kind of world,
where the demo's own hold for one world's questions.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path

import torch

from medtrain.trainer.demo.recipe import RECIPE, Recipe
from medtrain.trainer.demo.run import FURTHER, NUM_THREADS, run_demo
from medtrain.trainer.demo.table import LABELS, draw_bars
from medtrain.trainer.demo.texts import states_fact
from medtrain.trainer.demo.world import make_world
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.files import check_can_make, read_rows, write_json
from medtrain.trainer.processes import clean_context
from medtrain.trainer.run.folder import commit, device_name, versions

# Student's t at 97.5 % by degrees of freedom; beyond the list the normal distribution is near enough.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
CONTRASTS = (("cpt_rpo", "cpt"), ("rpo", "base"), ("cpt_rpo", "cpt_sft"), ("cpt_rpo", "cpt_dpo"))


def summarize(values: list[float]) -> dict[str, float]:
    """Mean and 95 % t interval of the mean over seeds; one seed has no interval."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": mean, "low": mean, "high": mean}
    t = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def stated(folder: Path, seed: int, recipe: Recipe, arm: str, kind: str = "test") -> float:
    """Share of an arm's explanations that state the fact asked for: the score alone does not say where an answer is from."""
    world = make_world(seed, recipe.sizes)
    path = folder / "exams" / kind / arm / "outputs-explain.jsonl"
    rows = read_rows(path)
    return statistics.fmean(states_fact(world, row["prompt"], row["output"]) for row in rows)


def scores(table: dict, arm: str) -> dict[str, float]:
    """One seed's numbers of an arm, from the demo's table and :func:`stated`."""
    row = table[arm]
    answer, explain = row["answer"]["points_ratio"], row["explain"]["points_ratio"]
    return {"answer": answer, "explain": explain, "gap": row["gap"], "stated": row["stated"]}


def about(recipe: Recipe) -> dict:
    """What computed a result of the demo."""
    return {
        "device": device_name(torch.device("cpu")),
        "threads": NUM_THREADS,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "recipe": recipe.plain(),
    }


def result(tables: dict[int, dict], seconds: dict[int, float], recipe: Recipe = RECIPE, jobs: int = 1) -> dict:
    """The JSON of all seeds: the arms, each seed's numbers, and arms against one another, seed by seed."""
    names = ("answer", "explain", "gap", "stated")
    arms = list(next(iter(tables.values())))
    by_seed = {arm: {seed: scores(table, arm) for seed, table in tables.items()} for arm in arms}
    return about(recipe) | {
        "seeds": list(tables),
        "seconds": list(seconds.values()),
        "jobs": jobs,  # worlds at a time, that shared the machine
        "interval": "95 % t interval of the mean over seeds",
        "questions": tables[next(iter(tables))]["base"]["answer"]["questions"],
        "arms": {
            arm: {name: summarize([row[name] for row in rows.values()]) for name in names}
            | {"by_seed": [rows[seed] for seed in tables]}
            for arm, rows in by_seed.items()
        },
        "contrasts": {
            f"{one} - {other}": {
                name: summarize([by_seed[one][seed][name] - by_seed[other][seed][name] for seed in tables]) for name in names
            }
            for one, other in (*CONTRASTS, *(("cpt_rpo", arm) for arm in FURTHER if arm in arms))
        },
    }


def run_seeds(
    out: Path | str,
    first_seed: int,
    num_seeds: int,
    *,
    quiet: bool = False,
    recipe: Recipe = RECIPE,
    further: Sequence[str] = (),
    jobs: int = 1,
) -> dict:
    """Run the demo of each seed in ``OUT/seed-N``, as far as it is not there yet; returns what ``OUT/four-arms.json`` holds.

    ``jobs`` seeds run at the same time, a process each; it changes no number.

    Prints the table over seeds and writes ``four-arms.json`` and ``four-arms.png``. ``further``: as of ``run_demo``. Raises
    :class:`InputError` where ``out`` holds a demo of one seed, or one of its folders something else than a demo of that seed.
    """
    out = Path(out)
    check_can_make(out)
    with user_path(out):
        one = (out / "demo.json").exists()
    if one:
        raise bad_input("holds a demo of one seed", file=out, expected="another --out folder")
    if jobs > 1:
        say = (lambda line: None) if quiet else (lambda line: print(line, flush=True))
        _run_beside_one_another(out, range(first_seed, first_seed + num_seeds), recipe, further, jobs, say)
    tables, seconds = {}, {}
    threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)  # as each demo does, and so that the result names what was used
    try:
        for seed in range(first_seed, first_seed + num_seeds):
            folder = out / f"seed-{seed}"
            tables[seed] = run_demo(folder, seed, quiet or jobs > 1, recipe, further)
            for arm, row in tables[seed].items():
                row["stated"] = stated(folder, seed, recipe, arm)
            seconds[seed] = _seconds(folder)
        found = result(tables, seconds, recipe, jobs)
    finally:
        torch.set_num_threads(threads)
    path = out / "four-arms.json"
    write_json(path, found)
    bars = {
        arm: {mode: tuple(found["arms"][arm][mode][key] for key in ("mean", "low", "high")) for mode in ("answer", "explain")}
        for arm in found["arms"]
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


def _run_beside_one_another(
    out: Path, seeds: Sequence[int], recipe: Recipe, further: Sequence[str], jobs: int, say: Callable[[str], None]
) -> None:
    """Run the demos of ``seeds``, ``jobs`` at a time; the first that fails ends it, what the others have done stays."""
    say(f"{len(seeds)} worlds, {jobs} at a time, in {out}")
    with ProcessPoolExecutor(min(jobs, len(seeds)), mp_context=clean_context(__name__)) as pool:
        begun = {pool.submit(run_demo, out / f"seed-{seed}", seed, True, recipe, further): seed for seed in seeds}
        try:
            for demo in as_completed(begun):
                cpt, rpo = (demo.result()[arm] for arm in ("cpt", "cpt_rpo"))
                say(
                    f"seed {begun[demo]}: gap of CPT {cpt['gap']:+.3f}, of CPT + RPO {rpo['gap']:+.3f}, "
                    f"{_seconds(out / f'seed-{begun[demo]}'):.0f} s"
                )
        except BaseException as error:
            say(f"ends ({type(error).__name__}) when the worlds under way are done")
            pool.shutdown(cancel_futures=True)
            raise


def _seconds(folder: Path) -> float:
    """What the stages of one demo took, in whichever of its runs."""
    return round(sum(json.loads((folder / "times.json").read_text(encoding="utf-8")).values()), 1)


def format_result(found: dict) -> str:
    """The JSON as a table of text: mean [low, high]; of one arm less another, seed by seed."""

    def cell(value: dict, sign: str = "") -> str:
        return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"

    lines = [f"{len(found['seeds'])} seeds, {found['interval']}", f"{'':22}{'answer':26}{'explain':26}{'gap':26}fact stated"]
    for arm, row in found["arms"].items():
        lines.append(
            f"{LABELS[arm]:22}{cell(row['answer']):26}{cell(row['explain']):26}{cell(row['gap'], '+'):26}{cell(row['stated'])}"
        )
    lines.append("one arm less another, seed by seed:")
    for name, row in found["contrasts"].items():
        lines.append(
            f"{name:22}" + "".join(f"{cell(row[key], '+'):26}" for key in ("answer", "explain", "gap", "stated")).rstrip()
        )
    return "\n".join(lines)
