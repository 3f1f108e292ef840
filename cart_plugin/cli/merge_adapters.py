"""`mergekit-cart merge-adapters`: LoRA adapters of one base become one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cart_plugin.cli.console import console, print_report, progress
from cart_plugin.errors import CartError


class Rank(click.ParamType):
    """A number, or `full`."""

    name = "rank"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """The rank as a number, or the word."""
        if value == "full":
            return "full"
        try:
            return int(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor full", param, ctx)


class Listed(click.ParamType):
    """Values with commas between."""

    name = "list"

    def __init__(self, kind: type[str] | type[float]) -> None:
        """Of strings or numbers."""
        self.kind = kind

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Any]:
        """The values."""
        try:
            return [self.kind(part.strip()) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 1,1,2", param, ctx)


@click.command("merge-adapters", short_help="Merge LoRA adapters of one base into one adapter.")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...", type=click.Path())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--method",
    type=click.Choice(["auto", "cart", "linear"]),
    help="auto disturbs each adapter least and has nothing to set; cart has a lambda; linear is "
    "the average [auto].",
)
@click.option(
    "--rank",
    type=Rank(),
    help="Of the merged adapter; full loses nothing: the sum of the adapters' ranks [their "
    "largest].",
)
@click.option("--weights", type=Listed(float), help="One an adapter, with commas between [equal].")
@click.option("--lambda", "lambda_", type=float, help="Of cart: scale of what is added [1].")
@click.option(
    "--rank-ratio",
    type=float,
    help="Of cart and auto: share of a weight's full rank kept of each difference [as for whole "
    "models].",
)
@click.option("--keep", type=int, help="Their number instead.")
@click.option(
    "--names", type=Listed(str), help="The adapters' names, with commas between [their folders']."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the merged adapter [the adapters' own].",
)
@click.option("--base", metavar="MODEL", help="Name of the base to write [the adapters' own].")
def merge_adapters(adapters: tuple[str, ...], out: Path, **options: Any) -> None:
    """Merge LoRA ADAPTERs of one base into the adapter OUT.

    ADAPTERs are PEFT folders, or names on the hub of what is in its local cache; or one YAML file
    that lists them, with the same words as these options, which go before the file's. The base
    itself is not read. PEFT loads the result, and so do vLLM, SGLang and llama.cpp if it is of
    linear layers alone; the last line says so. Nothing appears under OUT before all is done.
    """
    from cart_plugin.adapters import merge_adapters as run
    from cart_plugin.adapters.recipes import read_recipe
    from cart_plugin.adapters.servers import CONDITION
    from cart_plugin.checkpoints.servers import summary

    terminal = console()
    given = {name: value for name, value in options.items() if value is not None}
    try:
        arguments: dict[str, Any] = {"adapters": adapters, **given}
        recipe = Path(adapters[0])
        if len(adapters) == 1 and recipe.suffix in (".yaml", ".yml") and not recipe.is_dir():
            arguments = read_recipe(recipe, given)
        with progress() as tell:
            report = run(out=out, progress=tell, **arguments)
    except CartError as error:
        raise click.ClickException(str(error)) from None
    print_report(terminal, report)
    full = report.merge.full_rank
    of = f" of {full}, which would lose nothing (--rank full)" if report.rank < full else ""
    terminal.print(
        f"one adapter of rank {report.rank}{of}, {report.bytes:,} bytes, in "
        f"{report.seconds:.0f} s: {out} (also report.json)",
        soft_wrap=True,
        markup=False,
    )
    terminal.print(summary(report.loaders, CONDITION), soft_wrap=True, markup=False)
