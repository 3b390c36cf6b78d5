"""The exam's commands: eval, score, compare and pairs; they parse, call and print."""

from __future__ import annotations

import functools
import json
from typing import Any

import click

PATH = click.Path(readable=False)  # who opens it tells whether it can be read
MAPPING = click.option("--mapping", type=PATH, help="YAML: which fields hold what, for an exam of an own form (docs/exam.md).")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
METHODS = click.Choice(["generate", "choice_logp"])
AT_LEAST_1 = click.IntRange(min=1)
option = functools.partial(click.option, show_default=True)


def print_json(result: dict) -> None:
    click.echo(json.dumps(result, ensure_ascii=False, indent=2))


@click.command(short_help="Sample reasoning and write preference pairs.")
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
def pairs(config: str, overrides: tuple[str, ...]) -> None:
    """Sample reasoning on questions, grade it, and write preference pairs, as CONFIG.yaml has it; prints the summary.

    OUT.paths.jsonl keeps every sampled path with its grade; a run that was killed goes on from it.
    """
    from medtrain.trainer.config.exam import load_pairs_config

    settings = load_pairs_config(config, overrides)
    from medtrain.trainer.exam.pairs.run import run_pairs  # seconds, not for a typing slip
    from medtrain.trainer.run.console import console_logging

    with console_logging(enabled=True):
        summary = run_pairs(settings)
    del summary["settings"]  # in the file
    print_json(summary)


@click.command("eval", short_help="Evaluate a model on an exam, answer alone and with explanation.")
@click.option("--model", required=True, type=PATH, help="A Hugging Face folder.")
@click.option("--exam", required=True, type=PATH, help="Questions, JSON Lines or CSV.")
@click.option("--out", required=True, type=PATH, help="Where exam.json and the outputs go.")
@option("--mode", type=click.Choice(["answer", "explain", "both"]), default="both")
@option("--engine", type=click.Choice(["hf", "vllm"]), default="hf")
@option(
    "--method", type=METHODS, default="generate", help="choice_logp: the likeliest answer, nothing generated (--mode answer)."
)
@click.option("--prompt", metavar="NAME_OR_FILE", help="default, english, official, demo (configs/prompts), or a YAML file.")
@click.option("--chat", is_flag=True, help="Use the checkpoint's chat template (instruct models).")
@click.option("--demonstrations", type=PATH, help="Worked examples for a few-shot prompt, JSON Lines.")
@MAPPING
@click.option("--images", is_flag=True, help="Include questions that need an image; they are left out otherwise.")
@option("--max-new-tokens", type=AT_LEAST_1, default=1024, help="Of an explanation.")
@option("--max-answer-tokens", type=AT_LEAST_1, default=32, help="Of an answer alone.")
@option("--batch-tokens", type=AT_LEAST_1, default=65_536, help="hf: prompt and new tokens at once; fewer where memory runs out.")
@option("--dtype", default="auto", help="float32, bfloat16, ...; auto: the checkpoint's.")
@click.option("--limit", type=AT_LEAST_1, help="Only the first questions, this many.")
@AS_JSON
def evaluate(model: str, exam: str, out: str, as_json: bool, **options: Any) -> None:
    """Evaluate a model on an exam, for the answer alone and with explanation; prints a table and writes exam.json.

    The same command again goes on with what is not yet answered.
    """
    from medtrain.trainer.config.exam import EvalSettings
    from medtrain.trainer.exam import evaluate as evaluation
    from medtrain.trainer.run.console import console_logging

    with console_logging(enabled=True):
        result = evaluation.evaluate(model, exam, out, EvalSettings(**options))
    if as_json:
        print_json(result)
    else:
        click.echo(evaluation.as_text(result))


@click.command()
@click.option("--exam", required=True, type=PATH, help="Questions, JSON Lines or CSV.")
@click.option("--predictions", required=True, type=PATH, help="Rows {problem_id, prediction} or {problem_id, output}.")
@click.option("--details", type=PATH, help="Write one object per question here.")
@MAPPING
def score(exam: str, predictions: str, details: str | None, mapping: str | None) -> None:
    """Score predictions by the official rule; prints JSON."""
    from medtrain.trainer.exam.scoring import run_score

    print_json(run_score(exam, predictions, details, mapping))


@click.command(short_help="Compare two exam results, question by question.")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@AS_JSON
def compare(a: str, b: str, as_json: bool) -> None:
    """Compare B with A, question by question: two out folders of eval, or two details files of score.

    Differences of points with their 95 % intervals (bootstrap over the questions) and exact paired tests.
    """
    from medtrain.trainer.exam import compare as comparison

    result = comparison.compare(a, b)
    if as_json:
        print_json(result)
    else:
        click.echo(comparison.as_text(result))
