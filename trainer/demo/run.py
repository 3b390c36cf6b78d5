"""The whole recipe in miniature: pretraining, CPT, pairs, RPO and the examination, on made-up medicine, in minutes.

Every stage goes the product's own way: the same training loop, pair builder and examination as for real models. Run it
again with the same folder and seed, and it goes on from where it was stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medtrain.trainer.demo.recipe import RECIPE, Recipe
from medtrain.trainer.demo.table import conclusions, draw_table, format_table, marks_of
from medtrain.trainer.demo.texts import WorldFiles, names_in, write_jsonl, write_world
from medtrain.trainer.demo.world import World, make_world
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.files import check_can_make, read_rows, write_json

# Every preference arm: the model it starts from, what differs from the recipe's RPO, and what it is.
PREFERENCES = {
    "cpt_rpo": ("cpt", {}, "cpt, then RPO on its pairs"),
    "rpo": ("base", {}, "base, then RPO on its pairs: no textbook"),
    "cpt_sft": ("cpt", {"loss": "sft"}, "control: the chosen side alone"),
    "cpt_dpo": ("cpt", {"alpha": 0.0}, "control: DPO, no likelihood term"),
}
# On request, as published: no likelihood term. SimPO's beta and margin are of its paper's range (arXiv:2405.14734).
FURTHER = {
    "cpt_ipo": ("cpt", {"loss": "ipo", "alpha": 0.0}, "control: IPO"),
    "cpt_simpo": ("cpt", {"loss": "simpo", "alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}, "control: SimPO, no reference"),
}
ARMS = ("base", "cpt", "rpo", "cpt_rpo", "cpt_sft", "cpt_dpo")
NUM_THREADS = 1  # another number sums in another order, and a model this small ends elsewhere; nor is it much faster


@dataclass(frozen=True)
class Demo:
    """One run of the demo: its folder, seed and settings; ``say`` prints a line."""

    out: Path
    seed: int
    recipe: Recipe
    say: Callable[[str], None]

    @property
    def files(self) -> WorldFiles:
        return WorldFiles(self.out / "world")

    def model(self, arm: str) -> Path:
        return self.out / arm / "model"

    def pairs(self, arm: str) -> Path:
        return self.out / "pairs" / f"{arm}.jsonl"


def run_demo(out: Path | str, seed: int = 10, quiet: bool = False, recipe: Recipe = RECIPE, further: Sequence[str] = ()) -> dict:
    """Run all stages that ``out`` does not hold yet; returns what ``OUT/table.json`` holds.

    ``further`` names arms of :data:`FURTHER` to train and examine beside the usual ones. Prints the table and writes
    ``table.json``, ``table.png``, and one folder a model. Raises :class:`InputError` where ``out`` holds something else
    than a demo of this seed and these settings.
    """
    import torch

    from medtrain.trainer.run.report import write_report

    demo = Demo(Path(out), seed, recipe, (lambda line: None) if quiet else lambda line: print(line, flush=True))
    claim(demo)
    began = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, NUM_THREADS))
    try:
        demo.say(_INTRODUCTION.format(out=demo.out, seed=seed, **_counts(demo)))
        prepare(demo)
        for arm, (start, settings, what) in (PREFERENCES | {arm: FURTHER[arm] for arm in further}).items():
            with _stage(demo, arm, what):
                prefer(demo, arm, start, **settings)
        arms = (*ARMS, *further)
        with _stage(demo, "exam", f"{len(arms)} models, with and without explanation"):
            table = {arm: sit_exam(demo, arm, "test") for arm in arms}
            for arm in arms:
                write_report(demo.out / arm, evals=[demo.out / "exams" / "test" / arm])
    finally:
        torch.set_num_threads(threads)
    write_json(demo.out / "table.json", table)
    marks = {arm: marks_of(exam_rows(demo, arm, "test")) for arm in arms}
    draw_table(table, marks, demo.out / "table.png", title=f"medtrain demo, made-up medicine, seed {seed}")
    demo.say("\n" + format_table(table, marks))
    demo.say("\n" + conclusions(table, marks, num_parameters(demo.model("base"))))
    demo.say(f"\ntable: {demo.out / 'table.json'}   picture: {demo.out / 'table.png'}")
    demo.say(f"all of it took {time.monotonic() - began:.0f} s")
    return table


def prepare(demo: Demo, starts: Sequence[str] = ("cpt", "base")) -> World:
    """Everything before the preference stage: the texts, the models ``base`` and ``cpt``, and the pairs of ``starts``."""
    recipe = demo.recipe
    world = make_world(demo.seed, recipe.sizes)
    with _stage(demo, "world", f"{len(world.facts):,} facts, their texts, the examination"):
        if not (demo.files.root / "tokenizer").is_dir():
            write_world(world, recipe.corpus, demo.files.root)
    with _stage(demo, "base", f"pretraining, {recipe.base_steps:,} steps"):
        pretrain(demo)
    with _stage(demo, "cpt", f"base, then the textbook, {recipe.cpt_steps:,} steps"):
        continue_pretraining(demo)
    for start in starts:
        with _stage(demo, "pairs", f"wrong reasoning sampled from {start}"):
            make_pairs(demo, world, start)
    return world


def pretrain(demo: Demo) -> None:
    recipe = demo.recipe
    shape = {
        "model_type": "qwen2",
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_hidden_layers,
        "num_attention_heads": recipe.num_attention_heads,
        "num_key_value_heads": recipe.num_attention_heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    _train(
        demo,
        "cpt",
        "base",
        model={"init": shape, "tokenizer": str(demo.files.tokenizer)},
        data={"sources": _sources(demo, recipe.base_shares), "seq_len": 256},
        optim={"lr": recipe.base_lr, "steps": recipe.base_steps, "batch_tokens": recipe.base_tokens}
        | {"warmup_steps": min(50, recipe.base_steps // 10), "weight_decay": 0.01},
    )


def continue_pretraining(demo: Demo) -> None:
    recipe = demo.recipe
    total = sum(recipe.replay_shares.values())
    shares = {name: recipe.replay * share / total for name, share in recipe.replay_shares.items()}
    textbook = {"path": str(demo.files.textbook), "weight": 1 - recipe.replay, "name": "textbook"}
    _train(
        demo,
        "cpt",
        "cpt",
        model={"path": str(demo.model("base"))},
        data={"sources": [textbook, *_sources(demo, shares)], "seq_len": 256} | _exam(demo),
        optim={"lr": recipe.cpt_lr, "steps": recipe.cpt_steps, "batch_tokens": recipe.cpt_tokens}
        | {"warmup_steps": min(10, recipe.cpt_steps // 10), "weight_decay": 0.01},
    )


def make_pairs(demo: Demo, world: World, start: str) -> None:
    """Pairs of one model: its own wrong explanations about train diseases against the ground truth's.

    An answer that is none of the options is wrong here for certain, as answers are the options' own texts.
    A model may name any disease while it reasons; pairs that name one of another kind are left out and counted.
    """
    from medtrain.trainer.config.exam import PairsConfig
    from medtrain.trainer.exam.pairs.run import run_pairs

    final = demo.pairs(start)
    if final.is_file():
        return
    final.parent.mkdir(exist_ok=True)
    raw = final.with_name(f"{start}-all.jsonl")
    run_pairs(
        PairsConfig(
            model=str(demo.model(start)),
            questions=str(demo.files.exam("train")),
            out=str(raw),
            strategy="explanation",
            balance_length=False,
            num_paths=demo.recipe.num_paths,
            seed=demo.seed,
            max_new_tokens=demo.recipe.max_new_tokens,
            prompt="demo",
            unlisted_is_wrong=True,
            dtype="float32",
        )
    )
    rows = read_rows(raw)
    allowed = set(world.diseases["train"]) | set(world.diseases["general"])
    kept = [row for row in rows if names_in(world, row["prompt"] + row["chosen"] + row["rejected"]) <= allowed]
    write_jsonl(final, kept)
    demo.say(f"         {len(kept)} pairs; {len(rows) - len(kept)} left out, for they name a disease of the exams")


def prefer(demo: Demo, arm: str, start: str, **rpo: object) -> None:
    """Train on the pairs of ``start``: RPO, or a control of it by other ``rpo`` settings, the recipe's own for it first."""
    recipe = demo.recipe
    tuned = dict(recipe.tuned.get(arm, {}))
    lr = tuned.pop("lr", recipe.rpo_lr)
    _train(
        demo,
        "rpo",
        arm,
        model={"path": str(demo.model(start))},
        data={"pairs": [{"path": str(demo.pairs(start))}], "max_length": 256} | _exam(demo),
        optim={"lr": lr, "steps": recipe.rpo_steps, "batch_pairs": recipe.rpo_pairs}
        | {"warmup_steps": min(6, recipe.rpo_steps // 10), "weight_decay": 0.0},
        rpo={"beta": recipe.beta, "alpha": recipe.alpha} | rpo | tuned,
    )


def sit_exam(demo: Demo, arm: str, kind: str) -> dict:
    """One model's examination about diseases of one kind: ``answer``, ``explain``, ``gap``."""
    from medtrain.trainer.config.exam import EvalSettings
    from medtrain.trainer.exam.evaluate import evaluate

    settings = EvalSettings(prompt="demo", max_new_tokens=demo.recipe.max_new_tokens, max_answer_tokens=4, dtype="float32")
    result = evaluate(demo.model(arm), demo.files.exam(kind), demo.out / "exams" / kind / arm, settings)
    if "invalid" in result:
        demo.say(f"         {arm}: these figures are invalid: {result['invalid']}")
    return {"answer": result["answer"], "explain": result["explain"], "gap": result["explanation_gap"]}


def exam_rows(demo: Demo, arm: str, kind: str) -> dict[str, list[dict]]:
    """What :func:`sit_exam` left of each question, by mode."""
    folder = demo.out / "exams" / kind / arm
    return {mode: read_rows(folder / f"outputs-{mode}.jsonl") for mode in ("answer", "explain")}


def num_parameters(model: Path) -> int:
    """How many parameters a model folder holds; tied ones count once."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="np") as handle:
        return sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())  # noqa: SIM118


def _train(demo: Demo, stage: str, name: str, **sections: dict) -> None:
    from medtrain.trainer.config.settings import config_from_dict
    from medtrain.trainer.train.loop import train

    if demo.model(name).is_dir():  # appears whole, at the very end
        return
    sections["data"] = sections["data"] | {"cache": str(demo.out / "cache")}
    sections["optim"] = sections["optim"] | {"micro_batch_tokens": 8192}
    tree = sections | {
        "precision": {"compute": "float32"},
        "eval": _exam_settings(demo.recipe) if "exam" in sections["data"] else {},
        "checkpoint": {"every": 100_000},
        "run": {"out": str(demo.out / name), "seed": demo.seed},
    }
    if train(config_from_dict(stage, tree), quiet=True).interrupted:
        raise KeyboardInterrupt


def _exam(demo: Demo) -> dict:
    """The exam that is sat during training is about development diseases: the table's own has been seen by nothing."""
    return {"exam": str(demo.files.exam("dev"))}


def _exam_settings(recipe: Recipe) -> dict:
    return {
        "exam_every": 50,
        "exam_questions": 100,
        "exam_max_new_tokens": recipe.max_new_tokens,
        "exam_max_answer_tokens": 4,
        "exam_prompt": "demo",
    }


def _sources(demo: Demo, shares: dict[str, float]) -> list[dict]:
    return [{"path": str(demo.files.pretraining(name)), "weight": share, "name": name} for name, share in shares.items()]


@contextmanager
def _stage(demo: Demo, name: str, what: str):
    """Print what a stage did and its seconds; ``times.json`` keeps the seconds of the run that did the work."""
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    path = demo.out / "times.json"
    times = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    again = "  (done before)" if what in times else ""
    write_json(path, {what: round(seconds, 1)} | times)
    demo.say(f"{name:8} {what:52} {seconds:5.1f} s{again}")


def claim(demo: Demo) -> None:
    """Make the folder this demo's, or find that it is."""
    record = {"seed": demo.seed, "recipe": demo.recipe.plain()}
    path = demo.out / "demo.json"
    check_can_make(demo.out)
    with user_path(demo.out):
        written = path.read_text(encoding="utf-8") if path.is_file() else None
    if written is not None:
        try:
            before = json.loads(written)
            before["recipe"].keys()
        except (ValueError, KeyError, TypeError, AttributeError):
            before = None
        if before is not None:  # a setting that an older version did not know had what is now its default
            before["recipe"] = json.loads(json.dumps(RECIPE.plain())) | before["recipe"]
        if before != json.loads(json.dumps(record)):
            raise bad_input("holds a demo of another seed or other settings", file=demo.out, expected="another --out folder")
        return
    with user_path(demo.out):
        if demo.out.exists() and (not demo.out.is_dir() or any(demo.out.iterdir())):
            raise bad_input("holds other things than a demo", file=demo.out, expected="a new or empty --out folder")
    with user_path(demo.out, "cannot be written"):
        demo.out.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def _counts(demo: Demo) -> dict[str, int]:
    sizes = demo.recipe.sizes
    return {"textbook": sizes.train + sizes.dev + sizes.test, "train": sizes.train, "test": sizes.test}


_INTRODUCTION = """\
A made-up medicine (seed {seed}): diseases, findings and drugs that do not exist, in Japanese.
A tiny model learns to read and to sit examinations on some diseases (base), reads a textbook on {textbook} others (CPT),
and learns from its own wrong explanations about {train} of them (RPO). The exam asks about {test} more of the textbook's
diseases, once for the answer alone and once for an explanation that ends with the answer.
Everything is written to {out}
"""
