"""Which learning rate and beta suit each preference loss of the demo, on development questions of development worlds.

    python -m medtrain.benchmarks.evidence.grid --recipe steps --seed 100 --worlds 4 --folder runs/grid [--out FILE.json]

Every arm is trained from the same model on the same pairs at every rate, then at its best rate with every beta, and takes the
development examination. The best setting of an arm has the highest mean score with explanation over the worlds. The questions
of the demo's table are not used. What is done already is not done again: several processes may each take some of the worlds
(``--rates-only``), and one of them collect.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from medtrain.benchmarks.evidence.seeds import about, scores
from medtrain.trainer.demo.recipe import RECIPES
from medtrain.trainer.demo.run import EXTRA_ARMS, NUM_THREADS, PREFERENCE_ARMS, Demo, claim, evaluate_arm, prepare, train_on_pairs
from medtrain.trainer.files import write_json
from medtrain.trainer.run.console import console_logging

ARMS = ("cpt_rpo", "cpt_sft", "cpt_dpo", *EXTRA_ARMS)
MODES = ("answer", "explain", "stated")
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 4e-4)
BETAS = {"cpt_rpo": (0.03, 0.3, 1.0), "cpt_dpo": (0.03, 0.3, 1.0)}

Scores = dict[str, float]


def examine(demo: Demo, name: str) -> Scores:
    """Development scores of a model: shares of points, and the share of explanations that state the fact."""
    found = scores(demo, name, evaluate_arm(demo, name, "dev"), "dev")
    return {mode: found[mode] for mode in MODES}


def train_cell(demo: Demo, arm: str, rate: float, beta: float | None = None) -> Scores:
    """One arm in one world at one setting; ``beta`` None is the arm's own."""
    default = (PREFERENCE_ARMS | EXTRA_ARMS)[arm]
    changed = default._replace(rpo=default.rpo | ({} if beta is None else {"beta": beta}))
    at = dataclasses.replace(demo, recipe=dataclasses.replace(demo.recipe, rpo_lr=rate))
    train_on_pairs(at, cell_name(arm, rate, beta), changed)
    return examine(at, cell_name(arm, rate, beta))


def cell_name(arm: str, rate: float, beta: float | None = None) -> str:
    return f"{arm}-{rate:g}" + ("" if beta is None else f"-beta-{beta:g}")


def run_grid(demos: Sequence[Demo], arms: Sequence[str], rates: Sequence[float], betas: dict[str, tuple]) -> dict:
    """All cells in all worlds; returns ``by_world``, ``means`` over worlds, and ``best``: arm -> rate and beta."""
    by_world: dict[int, dict[str, Scores]] = {demo.seed: {} for demo in demos}
    for demo in demos:
        prepare(demo, ("cpt",))
        by_world[demo.seed]["cpt"] = examine(demo, "cpt")

    def cell(arm: str, rate: float, beta: float | None = None) -> float:
        name = cell_name(arm, rate, beta)
        for demo in demos:
            found = by_world[demo.seed][name] = train_cell(demo, arm, rate, beta)
            click.echo(f"world {demo.seed}  {name:28}" + "   ".join(f"{mode} {found[mode]:.3f}" for mode in MODES))
        return statistics.fmean(by_world[demo.seed][name]["explain"] for demo in demos)

    best = {}
    for arm in arms:
        of_rate = {rate: cell(arm, rate) for rate in rates}
        rate = max(of_rate, key=of_rate.__getitem__)
        of_beta = {None: of_rate[rate]} | {beta: cell(arm, rate, beta) for beta in betas.get(arm, ())}
        best[arm] = {"lr": rate, "beta": max(of_beta, key=of_beta.__getitem__)}
    means = {
        name: {mode: round(statistics.fmean(rows[name][mode] for rows in by_world.values()), 4) for mode in MODES}
        for name in by_world[demos[0].seed]
    }
    return {"best": best, "means": means, "by_world": by_world}


@click.command()
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="steps", show_default=True)
@click.option("--seed", default=100, show_default=True, help="First development world.")
@click.option("--worlds", default=4, show_default=True)
@click.option("--arms", default=",".join(ARMS), show_default=True)
@click.option("--rates", default=",".join(f"{rate:g}" for rate in RATES), show_default=True)
@click.option("--rates-only", is_flag=True, help="No other betas: the best rate is that of all worlds.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where the models go.")
@click.option("--out", type=click.Path(path_type=Path), help="Result file (JSON).")
def main(recipe: str, seed: int, worlds: int, arms: str, rates: str, rates_only: bool, folder: Path, out: Path | None) -> None:
    """Which learning rate and beta suit each preference loss of the demo."""
    torch.set_num_threads(NUM_THREADS)
    demos = [Demo(folder / f"seed-{n}", n, RECIPES[recipe]) for n in range(seed, seed + worlds)]
    for demo in demos:
        claim(demo)
    with console_logging(enabled=True, name="medtrain.trainer.demo"):
        found = run_grid(demos, arms.split(","), [float(rate) for rate in rates.split(",")], {} if rates_only else BETAS)
    click.echo(f"\n{'mean over worlds':28}" + "".join(f"{mode:>9}" for mode in MODES))
    for name, row in found["means"].items():
        click.echo(f"{name:28}" + "".join(f"{row[mode]:9.3f}" for mode in MODES))
    click.echo(f"best by score with explanation: {found['best']}")
    if out is not None:
        asked = {"worlds": [demo.seed for demo in demos], "questions": "of development diseases"}
        write_json(out, about(RECIPES[recipe]) | asked | found)
        click.echo(out)


if __name__ == "__main__":
    main()
