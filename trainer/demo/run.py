"""The whole recipe in miniature: pretraining, CPT, pairs, RPO and the examination, on made-up medicine, in minutes.

Every stage goes the product's own way: the same training loop, pair builder and examination as for real models. Run it
again with the same folder and seed, and it goes on from where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from medtrain.trainer.demo.recipe import RECIPE, Recipe
from medtrain.trainer.demo.table import conclusions, draw_table, format_table, marks_of
from medtrain.trainer.demo.texts import names_in, write_world
from medtrain.trainer.demo.world import World, make_world
from medtrain.trainer.errors import user_path
from medtrain.trainer.exam.prompts import MODES
from medtrain.trainer.files import check_can_make, check_identity, read_rows, write_json, write_jsonl

log = logging.getLogger(__name__)


class Arm(NamedTuple):
    """A model of the preference stage: the model it starts from, what it is, and what differs from the recipe's RPO."""

    start: str
    description: str
    rpo: dict[str, object]


PREFERENCE_ARMS = {
    "rpo": Arm("base", "base, then RPO on its pairs: no textbook", {}),
    "cpt_rpo": Arm("cpt", "cpt, then RPO on its pairs", {}),
    "cpt_sft": Arm("cpt", "control: the chosen side alone", {"loss": "sft"}),
    "cpt_dpo": Arm("cpt", "control: DPO, no likelihood term", {"alpha": 0.0}),
}
# On request, as published: no likelihood term. SimPO's beta and margin are of its paper's range (arXiv:2405.14734).
_SIMPO = {"loss": "simpo", "alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
EXTRA_ARMS = {
    "cpt_ipo": Arm("cpt", "control: IPO", {"loss": "ipo", "alpha": 0.0}),
    "cpt_simpo": Arm("cpt", "control: SimPO, no reference", _SIMPO),
}
ARMS = ("base", "cpt", *PREFERENCE_ARMS)
NUM_THREADS = 1  # another number sums in another order, and a model this small ends elsewhere; nor is it much faster


@dataclass(frozen=True)
class Demo:
    """One run of the demo: its folder, seed and settings."""

    out: Path
    seed: int
    recipe: Recipe

    def text(self, name: str) -> str:
        """A file of :func:`write_world`."""
        return str(self.out / "world" / f"{name}.jsonl")

    def model(self, arm: str) -> Path:
        return self.out / arm / "model"

    def pairs(self, arm: str) -> Path:
        return self.out / "pairs" / f"{arm}.jsonl"

    def evaluation(self, arm: str, kind: str) -> Path:
        return self.out / "exams" / kind / arm

    def outputs(self, arm: str, kind: str, mode: str) -> list[dict]:
        """What :func:`evaluate_arm` left of each question."""
        return read_rows(self.evaluation(arm, kind) / f"outputs-{mode}.jsonl")


def run_demo(
    out: Path | str, seed: int = 10, quiet: bool = False, recipe: Recipe = RECIPE, extra_arms: Sequence[str] = ()
) -> dict:
    """Run all stages that ``out`` does not hold yet; returns what ``OUT/table.json`` holds.

    ``extra_arms`` are those of :data:`EXTRA_ARMS` to train and examine besides the usual ones. Prints the table and writes
    ``table.json``, ``table.png``, and one folder per model. Raises :class:`InputError` where ``out`` holds something else
    than a demo of this seed and these settings.
    """
    import torch

    from medtrain.trainer.run.console import console_logging
    from medtrain.trainer.run.report import write_report

    demo, arms, sizes = Demo(Path(out), seed, recipe), (*ARMS, *extra_arms), recipe.sizes
    claim(demo)
    began = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, NUM_THREADS))
    try:
        with console_logging(enabled=not quiet, name="medtrain.trainer.demo"):
            textbook = sizes.train + sizes.dev + sizes.test
            log.info(_INTRODUCTION.format(out=out, seed=seed, textbook=textbook, train=sizes.train, test=sizes.test))
            prepare(demo)
            for name, arm in (PREFERENCE_ARMS | {name: EXTRA_ARMS[name] for name in extra_arms}).items():
                with _stage(demo, name, arm.description):
                    train_on_pairs(demo, name, arm)
            with _stage(demo, "exam", f"{len(arms)} models, with and without explanation"):
                table = {arm: evaluate_arm(demo, arm, "test") for arm in arms}
                for arm in arms:
                    write_report(demo.out / arm, evals=[demo.evaluation(arm, "test")])
    finally:
        torch.set_num_threads(threads)
    write_json(demo.out / "table.json", table)
    marks = {arm: marks_of({mode: demo.outputs(arm, "test", mode) for mode in MODES}) for arm in arms}
    draw_table(table, marks, demo.out / "table.png", title=f"medtrain demo, made-up medicine, seed {seed}")
    if not quiet:
        parameters = json.loads((demo.out / "base" / "manifest.json").read_text(encoding="utf-8"))["parameters"]
        print(f"\n{format_table(table, marks)}\n\n{conclusions(table, marks, parameters['all'])}")
        print(f"\ntable: {demo.out / 'table.json'}   picture: {demo.out / 'table.png'}")
        print(f"all of it took {time.monotonic() - began:.0f} s", flush=True)
    return table


def prepare(demo: Demo, starts: Sequence[str] = ("cpt", "base")) -> None:
    """Everything before the preference stage: the texts, the models ``base`` and ``cpt``, and the pairs of ``starts``."""
    recipe = demo.recipe
    world = make_world(demo.seed, recipe.sizes)
    with _stage(demo, "world", f"{len(world.facts):,} facts, their texts, the examination"):
        if not (demo.out / "world" / "tokenizer").is_dir():  # written last
            write_world(world, recipe.corpus, demo.out / "world")
    with _stage(demo, "base", f"pretraining, {recipe.base_steps:,} steps"):
        pretrain(demo)
    with _stage(demo, "cpt", f"base, then the textbook, {recipe.cpt_steps:,} steps"):
        continue_pretraining(demo)
    for start in starts:
        with _stage(demo, "pairs", f"wrong reasoning sampled from {start}"):
            make_pairs(demo, world, start)


def pretrain(demo: Demo) -> None:
    recipe = demo.recipe
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {"model_type": "qwen2", "max_position_embeddings": 256, "tie_word_embeddings": True}
    shape |= {name: getattr(recipe, name) for name in sizes} | {"num_key_value_heads": recipe.num_attention_heads}
    model = {"init": shape, "tokenizer": str(demo.out / "world" / "tokenizer")}
    data = {"sources": _sources(demo, recipe.base_shares), "seq_len": 256}
    optim = {"lr": recipe.base_lr, "steps": recipe.base_steps, "batch_tokens": recipe.base_tokens}
    _train(demo, "cpt", "base", model, data, optim | {"warmup_steps": 50, "weight_decay": 0.01})


def continue_pretraining(demo: Demo) -> None:
    recipe = demo.recipe
    total = sum(recipe.replay_shares.values())
    shares = {name: recipe.replay * share / total for name, share in recipe.replay_shares.items()}
    textbook = {"path": demo.text("textbook"), "weight": 1 - recipe.replay, "name": "textbook"}
    model = {"path": str(demo.model("base"))}
    data = {"sources": [textbook, *_sources(demo, shares)], "seq_len": 256, "exam": demo.text("exam-dev")}
    optim = {"lr": recipe.cpt_lr, "steps": recipe.cpt_steps, "batch_tokens": recipe.cpt_tokens}
    _train(demo, "cpt", "cpt", model, data, optim | {"warmup_steps": 10, "weight_decay": 0.01})


def _sources(demo: Demo, shares: dict[str, float]) -> list[dict]:
    return [{"path": demo.text(f"pretraining-{name}"), "weight": share, "name": name} for name, share in shares.items()]


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
            questions=demo.text("exam-train"),
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
    log.info(f"         {len(kept)} pairs; {len(rows) - len(kept)} left out, for they name a disease of the exams")


def train_on_pairs(demo: Demo, name: str, arm: Arm) -> None:
    """RPO on the pairs of ``arm.start``, or a control of it; what the recipe has ``tuned`` for the arm comes first."""
    recipe = demo.recipe
    tuned = {"lr": recipe.rpo_lr, "beta": recipe.beta, "alpha": recipe.alpha} | arm.rpo | recipe.tuned.get(name, {})
    model = {"path": str(demo.model(arm.start))}
    data = {"pairs": [{"path": str(demo.pairs(arm.start))}], "max_length": 256, "exam": demo.text("exam-dev")}
    optim = {"lr": tuned.pop("lr"), "steps": recipe.rpo_steps, "batch_pairs": recipe.rpo_pairs}
    _train(demo, "rpo", name, model, data, optim | {"warmup_steps": 6, "weight_decay": 0.0}, rpo=tuned)


def _train(demo: Demo, stage: str, name: str, model: dict, data: dict, optim: dict, **loss: dict) -> None:
    """Train the model ``name``, unless it is there. The exam during training is about development diseases: nothing has
    seen the table's own."""
    from medtrain.trainer.config.settings import config_from_dict
    from medtrain.trainer.train.loop import train

    if demo.model(name).is_dir():  # appears whole, at the very end
        return
    warmup_steps = min(optim["warmup_steps"], optim["steps"] // 10)
    evaluation = {"exam_every": 50, "exam_questions": 100, "exam_prompt": "demo"}
    evaluation |= {"exam_max_new_tokens": demo.recipe.max_new_tokens, "exam_max_answer_tokens": 4}
    tree = loss | {
        "model": model,
        "data": data | {"cache": str(demo.out / "cache")},
        "optim": optim | {"warmup_steps": warmup_steps, "micro_batch_tokens": 8192},
        "precision": {"compute": "float32"},
        "eval": evaluation if "exam" in data else {},
        "checkpoint": {"every": 100_000},
        "run": {"out": str(demo.out / name), "seed": demo.seed},
    }
    if train(config_from_dict(stage, tree), quiet=True).interrupted:
        raise KeyboardInterrupt


def evaluate_arm(demo: Demo, arm: str, kind: str) -> dict:
    """One model's examination about diseases of one kind: ``answer``, ``explain``, ``gap``."""
    from medtrain.trainer.config.exam import EvalSettings
    from medtrain.trainer.exam.evaluate import evaluate

    settings = EvalSettings(prompt="demo", max_new_tokens=demo.recipe.max_new_tokens, max_answer_tokens=4, dtype="float32")
    result = evaluate(demo.model(arm), demo.text(f"exam-{kind}"), demo.evaluation(arm, kind), settings)
    if "invalid" in result:
        log.info(f"         {arm}: these figures are invalid: {result['invalid']}")
    return {"answer": result["answer"], "explain": result["explain"], "gap": result["explanation_gap"]}


@contextmanager
def _stage(demo: Demo, name: str, description: str) -> Iterator[None]:
    """Log what a stage did and its seconds; ``times.json`` keeps the seconds of the run that did the work."""
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    path = demo.out / "times.json"
    times = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    again = "  (done before)" if description in times else ""
    write_json(path, {description: round(seconds, 1)} | times)
    log.info(f"{name:8} {description:52} {seconds:5.1f} s{again}")


def claim(demo: Demo) -> None:
    """Make the folder this demo's, or check that it is."""
    path, record = demo.out / "demo.json", {"seed": demo.seed, "recipe": dataclasses.asdict(demo.recipe)}
    check_can_make(demo.out)
    with user_path(demo.out):
        occupied = demo.out.exists() and (not demo.out.is_dir() or any(demo.out.iterdir()))
        written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if written is not None:  # a setting that an older version did not know had what is now its default
        written["recipe"] = dataclasses.asdict(RECIPE) | written["recipe"]
    check_identity(demo.out, written, record, occupied=occupied, expected="a new or empty --out folder")
    if written is None:
        with user_path(demo.out, "cannot be written"):
            demo.out.mkdir(parents=True, exist_ok=True)
            write_json(path, record)


_INTRODUCTION = """\
A made-up medicine (seed {seed}): diseases, findings and drugs that do not exist, in Japanese.
A tiny model learns to read and to sit examinations on some diseases (base), reads a textbook on {textbook} others (CPT),
and learns from its own wrong explanations about {train} of them (RPO). The exam asks about {test} more of the textbook's
diseases, once for the answer alone and once for an explanation that ends with the answer.
Everything is written to {out}
"""
