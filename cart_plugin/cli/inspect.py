"""`mergekit-cart inspect`: what did fine-tuning do to these models, and what will a merge lose?"""

from __future__ import annotations

from pathlib import Path

import click

from cart_plugin.cli.console import console, progress
from cart_plugin.errors import CartError


@click.command(short_help="See what fine-tuning changed, and what a merge will lose.")
@click.argument("models", nargs=-1, required=True, metavar="RECIPE|MODEL...", type=click.Path())
@click.option("--base", metavar="MODEL", help="What the models were fine-tuned from.")
@click.option("--merged", metavar="MODEL", help="A merged model or adapter, to be judged.")
@click.option(
    "--inputs",
    multiple=True,
    metavar="FILE|FOLDER",
    help="Text file (an example a line) or folder of images, to measure on what the models get. "
    "One for all, or one a model in their order.",
)
@click.option("--names", help="The models' names, with commas between [the folders' names].")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report.")
def inspect(
    models: tuple[str, ...],
    base: str | None,
    merged: str | None,
    inputs: tuple[str, ...],
    names: str | None,
    out: Path | None,
) -> None:
    """See how far MODELs moved from their base, where, how alike they are, and what merges keep.

    MODELs are folders of whole models, or of PEFT adapters (also BASE+ADAPTER); or one recipe of
    mergekit, whose models, base model and weights are taken. Nothing is merged or changed. With
    --out, a report with drawings; started again, the same command goes on where it stopped.
    """
    from cart_plugin.execution.subjects import subjects
    from cart_plugin.inspect.run import inspect_models

    terminal = console()
    weights = None
    try:
        recipes = [name for name in models if name.endswith((".yaml", ".yml"))]
        if recipes and len(models) > 1:
            raise CartError(
                f"{recipes[0]} is a recipe, and there are models beside it; name one recipe, or "
                "models"
            )
        if recipes:
            found = subjects(Path(models[0]), base)
            models, base, weights = found.models, found.base, found.weighting
        with progress() as tell:
            report = inspect_models(
                models,
                base=base,
                merged=merged,
                inputs=inputs,
                names=None if names is None else [name.strip() for name in names.split(",")],
                weights=weights,
                out=out,
                progress=tell,
            )
    except CartError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        if out is not None:
            click.echo("interrupted: the same command goes on where it stopped", err=True)
        raise
    for table in report.tables():
        terminal.print(table)
        terminal.print()
    for text in report.words():
        terminal.print(text, soft_wrap=True, markup=False, style="dim")
    advice = report.advice()
    terminal.print()
    terminal.print("recommended", style="bold")
    for line in advice.recipe.splitlines():
        terminal.print(f"  {line}", soft_wrap=True, markup=False)
    for reason in [*advice.reasons, *report.notes]:
        terminal.print(f"- {reason}", soft_wrap=True, markup=False)
    if out is not None:
        terminal.print(
            f"report: {out / 'report.html'} (also report.md, report.json)", soft_wrap=True
        )
