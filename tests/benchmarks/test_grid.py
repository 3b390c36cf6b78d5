"""The grid of the demo's settings: every cell once, the best by the score with explanation, and what a recipe makes of it."""

import dataclasses
import json

import pytest

from medtrain.benchmarks.evidence import grid
from medtrain.trainer.demo import run as run_module
from medtrain.trainer.demo.recipe import Recipe
from medtrain.trainer.demo.run import Demo


@pytest.fixture
def trained(monkeypatch):
    """The cells that were trained, with no training: every cell scores as ``SCORES`` says."""
    cells = []

    def train_on_pairs(demo, name, arm):
        cells.append((demo.seed, name, demo.recipe.rpo_lr, arm.rpo))

    def examine(demo, name):
        scores = {"cpt_rpo-0.0001": 0.6, "cpt_rpo-0.001": 0.5, "cpt_rpo-0.0001-beta-0.3": 0.9}
        world = 0.1 if demo.seed == 8 else 0.0
        return {"answer": 0.5, "explain": scores.get(name, 0.2) - world, "stated": 0.0}

    monkeypatch.setattr(grid, "train_on_pairs", train_on_pairs)
    monkeypatch.setattr(grid, "examine", examine)
    monkeypatch.setattr(grid, "prepare", lambda demo, starts: None)
    return cells


def test_betas_are_tried_at_the_best_rate_of_all_worlds(trained, tmp_path):
    demos = [Demo(tmp_path, seed, Recipe()) for seed in (7, 8)]
    found = grid.run_grid(demos, ["cpt_rpo", "cpt_sft"], [1e-4, 1e-3], {"cpt_rpo": (0.3,)})
    assert found["best"] == {"cpt_rpo": {"lr": 1e-4, "beta": 0.3}, "cpt_sft": {"lr": 1e-4, "beta": None}}
    assert found["means"]["cpt_rpo-0.0001-beta-0.3"]["explain"] == pytest.approx(0.85)
    names = ["cpt_rpo-0.0001", "cpt_rpo-0.001", "cpt_rpo-0.0001-beta-0.3", "cpt_sft-0.0001", "cpt_sft-0.001"]
    assert [(seed, name) for seed, name, *_ in trained] == [(seed, name) for name in names for seed in (7, 8)]
    assert set(found["by_world"]) == {7, 8} and list(found["by_world"][7]) == ["cpt", *names]
    _, _, rate, rpo = next(cell for cell in trained if cell[1] == "cpt_rpo-0.0001-beta-0.3")
    assert rate == 1e-4 and rpo == {"beta": 0.3}
    assert all(rpo["loss"] == "sft" for _, name, _, rpo in trained if "sft" in name)


def test_a_recipe_gives_an_arm_its_own_rate_and_beta(monkeypatch, tmp_path):
    made = {}
    monkeypatch.setattr(
        run_module, "_train", lambda demo, stage, name, model, data, optim, rpo: made.update({name: {"optim": optim, "rpo": rpo}})
    )
    recipe = dataclasses.replace(Recipe(), tuned={"cpt_rpo": {"lr": 3e-5, "beta": 0.3}, "cpt_sft": {"lr": 2e-4}})
    demo = Demo(tmp_path, 7, recipe)
    for arm in ("cpt_rpo", "cpt_sft", "cpt_dpo"):
        run_module.train_on_pairs(demo, arm, run_module.PREFERENCE_ARMS[arm])
    assert [made[arm]["optim"]["lr"] for arm in made] == [3e-5, 2e-4, recipe.rpo_lr]
    assert [made[arm]["rpo"]["beta"] for arm in made] == [0.3, recipe.beta, recipe.beta]
    assert made["cpt_sft"]["rpo"]["loss"] == "sft" and made["cpt_dpo"]["rpo"]["alpha"] == 0
    json.dumps(dataclasses.asdict(recipe))
