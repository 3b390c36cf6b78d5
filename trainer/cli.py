"""The ``medtrain`` command: parses, calls, and turns errors into exit statuses (0 done, 2 the user's mistake, 1 else)."""

from __future__ import annotations

import sys

import click

from medtrain import __version__
from medtrain.trainer.errors import InputError


class _Group(click.Group):
    """Turns an InputError into its one line and exit status 2."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.echo(f"medtrain: {error}", err=True)
            sys.exit(2)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the recipe, not of the alphabet


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Continued pretraining (CPT) and Reasoning Preference Optimization (RPO) for Hugging Face checkpoints."""


CONFIG = click.argument("config", type=click.Path())
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")


def _train(stage: str, config: str, overrides: tuple[str, ...]) -> None:
    from medtrain.trainer.config import load_config
    from medtrain.trainer.loop import train

    result = train(load_config(stage, config, overrides))
    if result.interrupted:
        sys.exit(1)


@main.command()
@CONFIG
@OVERRIDES
def cpt(config: str, overrides: tuple[str, ...]) -> None:
    """Continue pretraining on text, as CONFIG.yaml says."""
    _train("cpt", config, overrides)


@main.command()
@CONFIG
@OVERRIDES
def rpo(config: str, overrides: tuple[str, ...]) -> None:
    """Optimize preferences between reasoning paths, as CONFIG.yaml says."""
    _train("rpo", config, overrides)


@main.command()
@click.argument("run_or_checkpoint", type=click.Path())
@click.argument("out_dir", type=click.Path())
def export(run_or_checkpoint: str, out_dir: str) -> None:
    """Write a run's last checkpoint, or the one named, as a Hugging Face folder."""
    from medtrain.trainer.loop import export_run

    click.echo(export_run(run_or_checkpoint, out_dir))


@main.command()
@CONFIG
@OVERRIDES
def check(config: str, overrides: tuple[str, ...]) -> None:
    """Read and check settings, tokenizer, weights and data; train nothing, write nothing but the token cache."""
    from medtrain.trainer.config import load_config
    from medtrain.trainer.loop import check as check_config

    click.echo(check_config(load_config(None, config, overrides)))


if __name__ == "__main__":
    main()
