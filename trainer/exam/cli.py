"""The exam's commands: eval, score, compare and pairs; they parse, call and print."""

from __future__ import annotations

import json

import click

PATH = click.Path(readable=False)  # whether it can be read is said by who opens it
MAPPING = click.option("--mapping", type=PATH, help="YAML: which fields hold what, for an exam of an own form (docs/exam.md).")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(result: dict) -> None:
    click.echo(json.dumps(result, ensure_ascii=False, indent=2))


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command(short_help="Sample reasoning and write preference pairs.")
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
def pairs(config: str, overrides: tuple[str, ...]) -> None:
    """Sample reasoning on questions, grade it, and write preference pairs, as CONFIG.yaml says; prints the summary.

    Beside the pairs, OUT.paths.jsonl keeps every sampled path with its grade; a run that was killed goes on from it.
    """
    from dataclasses import asdict

    from medtrain.trainer.config.settings import load_pairs_config
    from medtrain.trainer.exam.prompts import load_style

    settings = asdict(load_pairs_config(config, overrides))
    style = load_style(settings.pop("prompt"), chat=settings.pop("chat"))
    from medtrain.trainer.exam.pairs.build import run_pairs  # seconds, not for a typing slip

    summary = run_pairs(**settings, style=style, echo=_say)
    del summary["settings"]  # in the file
    print_json(summary)


@click.command("eval", short_help="Sit an exam, for the answer alone and with explanation.")
@click.option("--model", required=True, type=PATH, help="A Hugging Face folder.")
@click.option("--exam", required=True, type=PATH, help="Questions, JSON Lines or CSV.")
@click.option("--out", required=True, type=PATH, help="Where exam.json and the outputs go.")
@click.option("--mode", type=click.Choice(["answer", "explain", "both"]), default="both", show_default=True)
@click.option("--engine", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True)
@click.option(
    "--method",
    type=click.Choice(["generate", "choice_logp"]),
    default="generate",
    show_default=True,
    help="choice_logp: the most likely answer, nothing generated (--mode answer, --engine hf).",
)
@click.option("--prompt", metavar="NAME_OR_FILE", help="default, english, official, demo (configs/prompts), or a YAML file.")
@click.option("--chat", is_flag=True, help="Use the checkpoint's chat template (instruct models).")
@click.option("--demonstrations", type=PATH, help="Worked examples for a few-shot prompt, JSON Lines.")
@MAPPING
@click.option("--images", is_flag=True, help="Ask what needs an image too; such questions are left out otherwise.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Of an explanation.")
@click.option("--max-answer-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Of an answer alone.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=65_536,
    show_default=True,
    help="hf: tokens at once, prompts and new ones; fewer where memory runs out.",
)
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, ...; auto: the checkpoint's.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many questions.")
@AS_JSON
def evaluate(as_json: bool, **options) -> None:
    """Sit an exam, for the answer alone and with explanation; prints a table and writes exam.json.

    The same command again goes on with what is not yet answered.
    """
    from medtrain.trainer.exam.evaluate import as_text, run_eval

    result = run_eval(**options, echo=_say)
    if as_json:
        print_json(result)
    else:
        click.echo(as_text(result))


@click.command()
@click.option("--exam", required=True, type=PATH, help="Questions, JSON Lines or CSV.")
@click.option("--predictions", required=True, type=PATH, help="Rows {problem_id, prediction} or {problem_id, output}.")
@click.option("--details", type=PATH, help="Write one object a question here.")
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
    from medtrain.trainer.exam.compare import as_text
    from medtrain.trainer.exam.compare import compare as compare_sittings

    result = compare_sittings(a, b)
    if as_json:
        print_json(result)
    else:
        click.echo(as_text(result))
