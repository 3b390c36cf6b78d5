"""The ``medtrain`` command: parses, calls, and turns errors into exit statuses (0 done, 2 the user's mistake, 1 else)."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from medtrain import __version__
from medtrain.trainer import cli_exam as exam
from medtrain.trainer.cli_exam import PATH
from medtrain.trainer.errors import InputError, bad_input


class _Group(click.Group):
    """Turns an InputError into its one line and exit status 2."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except InputError as error:
            _fail(str(error))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the recipe, not of the alphabet


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Continued pretraining (CPT) and Reasoning Preference Optimization (RPO) for Hugging Face checkpoints."""
    # transformers imports torchao where it is installed, and torchao warns of kernels that this machine cannot load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fail(line: str) -> NoReturn:
    if _is_main():  # under torchrun every rank comes here with the same line
        click.echo(f"medtrain: {line}", err=True)
    sys.exit(2)


CONFIG = click.argument("config", type=PATH)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")


def _train(stage: str, config: str, overrides: tuple[str, ...]) -> None:
    from medtrain.trainer.config.settings import load_config

    settings = load_config(stage, config, overrides)
    from medtrain.trainer.train.loop import train  # seconds, not for a typing slip

    result = train(settings)
    if result.interrupted:
        sys.exit(1)


@main.command()
@CONFIG
@OVERRIDES
def cpt(config: str, overrides: tuple[str, ...]) -> None:
    """Continue pretraining on text, as CONFIG.yaml says."""
    _train("cpt", config, overrides)


@main.command(short_help="Optimize preferences between reasoning paths.")
@CONFIG
@OVERRIDES
def rpo(config: str, overrides: tuple[str, ...]) -> None:
    """Optimize preferences between reasoning paths, as CONFIG.yaml says."""
    _train("rpo", config, overrides)


for command in (exam.pairs, exam.evaluate, exam.score, exam.compare):
    main.add_command(command)


@main.command(short_help="The whole recipe in miniature on made-up medicine.")
@click.option("--out", type=PATH, default="demo-out", show_default=True, help="A new folder, or one to go on in.")
@click.option("--seed", type=click.IntRange(min=0), default=10, show_default=True, help="Another seed is another world.")
@click.option(
    "--seeds",
    "num_seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="So many worlds from --seed on, and a table over them.",
)
@click.option(
    "--recipe",
    type=click.Choice(["plain", "steps"]),
    default="plain",
    show_default=True,
    help="steps: explanations of several steps in varied wordings.",
)
@click.option("--arms", "extra_arms", default="", metavar="LIST", help="Further arms: ipo, simpo or ipo,simpo.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --seeds: so many worlds at a time, a CPU core each.",
)
def demo(out: str, seed: int, num_seeds: int, recipe: str, extra_arms: str, jobs: int) -> None:
    """The whole recipe in miniature on made-up medicine; prints the table of its arms."""
    from medtrain.trainer.demo.recipe import RECIPES
    from medtrain.trainer.demo.run import EXTRA_ARMS, run_demo

    arms = [f"cpt_{name.strip()}" for name in extra_arms.split(",") if name.strip()]
    for arm in arms:
        if arm not in EXTRA_ARMS:
            raise bad_input("not a known arm", field="--arms", found=arm.removeprefix("cpt_"), expected="ipo | simpo")
    if jobs > 1 and num_seeds == 1:
        raise bad_input("has no effect on one world", field="--jobs", found=jobs, expected="--seeds of 2 or more")
    if num_seeds == 1:
        run_demo(out, seed, recipe=RECIPES[recipe], extra_arms=arms)
    else:
        from medtrain.benchmarks.evidence.seeds import run_seeds

        run_seeds(out, seed, num_seeds, recipe=RECIPES[recipe], extra_arms=arms, jobs=jobs)


@main.command(short_help="Write a checkpoint as a Hugging Face folder.")
@click.argument("run_or_checkpoint", type=PATH)
@click.argument("out_dir", type=PATH)
@click.option("--adapter", is_flag=True, help="Of a LoRA run: the adapter alone, as a PEFT folder.")
def export(run_or_checkpoint: str, out_dir: str, adapter: bool) -> None:
    """Write a run's last checkpoint, or the one named, as a Hugging Face folder.

    A LoRA run's adapters are merged into the base weights that they were trained on (an NF4 base: widened, as trained).
    """
    from medtrain.trainer.run.export import export_run

    path = export_run(run_or_checkpoint, out_dir, adapter=adapter)
    if _is_main():
        click.echo(path)


@main.command(short_help="Write RUN/report.html again.")
@click.argument("run", type=PATH)
@click.option(
    "--exam",
    "evals",
    multiple=True,
    type=PATH,
    metavar="DIR",
    help="A folder of `medtrain eval` whose results to show; may be given more than once.",
)
def report(run: str, evals: tuple[str, ...]) -> None:
    """Write RUN/report.html again: curves, exam, explanations before and after, ledger and settings of a run."""
    from medtrain.trainer.run.report import write_report

    click.echo(write_report(run, evals=evals))


@main.command(short_help="Check settings, tokenizer, weights and data; train nothing.")
@CONFIG
@OVERRIDES
@click.option("--samples", type=click.IntRange(min=0), default=0, help="Print the first so many windows or pairs as text.")
def check(config: str, overrides: tuple[str, ...], samples: int) -> None:
    """Read and check settings, tokenizer, weights and data; train nothing, write nothing but the token cache."""
    from medtrain.trainer.config.settings import load_config

    settings = load_config(None, config, overrides)
    from medtrain.trainer.train.setup import check as check_config

    summary = check_config(settings, samples)
    if _is_main():
        click.echo(summary)


@main.command(short_help="Memory per rank by formula, without GPU, weights or data.")
@CONFIG
@OVERRIDES
@click.option("--world-size", type=click.IntRange(1, 65536), default=8, show_default=True, help="Ranks, one per GPU.")
@click.option(
    "--gpu-memory-gib",
    type=click.FloatRange(min=1),
    default=79.0,
    show_default=True,
    help="Of one GPU; a card of 80 GB has about 79.",
)
@click.option("--sizes", metavar="NAME_OR_FILE", help="The model's sizes: one of configs/models, or a config.json.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Expected share of the peak, for tokens/s.")
@click.option(
    "--peak-tflops", type=click.FloatRange(min=1), default=989.0, show_default=True, help="Dense bf16 of one GPU (an H100's)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    config: str,
    overrides: tuple[str, ...],
    world_size: int,
    gpu_memory_gib: float,
    sizes: str | None,
    mfu: float | None,
    peak_tflops: float,
    as_json: bool,
) -> None:
    """Memory per rank by formula, without GPU, weights or data, and what to change; exit status 1 where it does not fit."""
    from medtrain.trainer.config.settings import load_config

    settings = load_config(None, config, overrides)
    from medtrain.trainer.plan.command import plan_config

    result = plan_config(settings, world_size=world_size, gpu_memory_gib=gpu_memory_gib, sizes=sizes)
    if mfu is not None:
        rate = mfu * peak_tflops * 1e12 * world_size / result["flops_a_token"]
        result["expected_speed"] = {"tokens_per_second": rate, "mfu": mfu, "peak_tflops": peak_tflops}
    if as_json:
        exam.print_json(result)
    else:
        import yaml

        rounded = json.loads(json.dumps(result), parse_float=lambda number: round(float(number), 2))
        click.echo(yaml.safe_dump(rounded, sort_keys=False, width=120), nl=False)
    if not result["fits"]:
        sys.exit(1)


@main.group(short_help="Measure the op and training steps, and their peers.")
def bench() -> None:
    """Measure the log-probability op, its peers and a floor of bare GEMMs; a training step and TRL's."""


@bench.command("kernels", short_help="Time, memory and error of the op in all its modes.")
@click.option("--quick", is_flag=True, help="On a GPU: two shapes, nothing begun after 150 seconds.")
@click.option("--out", type=PATH, default="benchmarks/results", show_default=True, help="Folder of the files.")
@click.option("--shapes", metavar="NxHxV,...", help="Tokens x hidden size x vocabulary, instead of the usual ones.")
@click.option("--impl", "impls", metavar="NAME,...", help="Only these implementations.")
@click.option("--commit", help="Recorded where the source tree is not a git checkout.")
def bench_kernels(quick: bool, out: str, shapes: str | None, impls: str | None, commit: str | None) -> None:
    """Time, memory and error of the op in all its modes; on a CPU a small form, where memory and errors hold."""
    from medtrain.benchmarks.kernels import parse_names, parse_shapes, run_kernels
    from medtrain.trainer.run.console import console_logging

    chosen = {
        "shapes": parse_shapes(shapes) if shapes is not None else None,
        "impls": parse_names(impls) if impls is not None else None,
    }
    with console_logging(enabled=True):
        result, path = run_kernels(out, quick=quick, commit=commit, **chosen)
    _show_benchmark(result, path)


@bench.command("train", short_help="Our training step, and TRL's or Trainer's.")
@click.option("--stage", type=click.Choice(["cpt", "rpo"]), default="rpo", show_default=True)
@click.option("--model", metavar="tiny|0.5b|1.5b|7b", help="Only this size; by default tiny on a CPU, the others on a GPU.")
@click.option("--quick", is_flag=True, help="On a GPU: fewer rows and steps, nothing begun after 300 seconds.")
@click.option("--out", type=PATH, default="benchmarks/results", show_default=True, help="Folder of the files.")
@click.option("--commit", help="Recorded where the source tree is not a git checkout.")
def bench_train(stage: str, model: str | None, quick: bool, out: str, commit: str | None) -> None:
    """Speed, memory, padding and loss of our step and a peer's on random weights: TRL's for RPO, Trainer's for CPT."""
    import torch

    from medtrain.benchmarks.train import choose, run_train
    from medtrain.trainer.run.console import console_logging

    models = choose(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"), stage)
    with console_logging(enabled=True):
        result, path = run_train(out, stage=stage, models=models, quick=quick, commit=commit)
    _show_benchmark(result, path)


def _show_benchmark(result: dict, path: Path) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from medtrain.benchmarks.report import failures, markdown

    Console(width=None if sys.stdout.isatty() else 160).print(Markdown(markdown(result)))
    click.echo(f"{path}\n{path.with_suffix('.md')}")
    if failed := failures(result):
        click.echo("\n".join(f"medtrain: failed: {line}" for line in failed), err=True)
        sys.exit(1)


@bench.command("tune", short_help="The op's fastest launch choices on this GPU.")
@click.option("--shapes", metavar="NxHxV,...", default="8192x3584x152064", show_default=True, help="As in `bench kernels`.")
def bench_tune(shapes: str) -> None:
    """Find the op's fastest launch choices on this GPU; prints entries for the table in kernels/logps_launch.py."""
    import torch

    from medtrain.benchmarks.kernels import parse_shapes
    from medtrain.benchmarks.tune import tune
    from medtrain.trainer.run.console import console_logging

    chosen = parse_shapes(shapes)
    if not torch.cuda.is_available():
        _fail("bench tune: no CUDA device here, and launch choices mean nothing without one")
    with console_logging(enabled=True):
        found = tune(chosen, torch.device("cuda"))
    for hidden_size, launch in found.items():
        click.echo(f"    {hidden_size}: {launch},")


@bench.command("table", short_help="A benchmark's tables as Markdown.")
@click.argument("file", type=PATH)
def bench_table(file: str) -> None:
    """Draw the tables of a benchmark FILE.json as Markdown."""
    from medtrain.benchmarks.report import load, markdown

    click.echo(markdown(load(file)), nl=False)


if __name__ == "__main__":
    main()
