"""`mergekit-cart compare`: what does each merge method make of this recipe?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cart_plugin.cli.console import console
from cart_plugin.errors import CartError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from cart_plugin.compare.steps import Comparison, Row

_METHODS = "cart,cart_auto,linear,task_arithmetic,ties,dare_ties,model_stock"


@click.command(short_help="Merge a recipe by several methods, and judge each.")
@click.argument("recipe", type=click.Path(path_type=Path))
# `--grid a.b=1,2 c.d=3,4`: click gives an option one value, and what follows is an argument.
@click.argument("more_grid", nargs=-1, metavar="")
@click.option("--methods", default=_METHODS, show_default=True, help="mergekit's names of them.")
@click.option("--tasks", help="lm-eval's tasks, with commas between.")
@click.option(
    "--evaluator",
    metavar="MODULE:FUNCTION",
    help="Instead of lm-eval: a function that takes a model's folder and returns {name: number}.",
)
@click.option(
    "--also",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder of a model to judge beside them, such as one merged by another tool.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of results.")
@click.option(
    "--set", "fixed", multiple=True, metavar="METHOD.PARAMETER=VALUE", help="Replaces the recipe's."
)
@click.option(
    "--grid",
    multiple=True,
    metavar="METHOD.PARAMETER=VALUE,VALUE",
    help="Each value is a row of its own. More grids may follow; those of one method multiply.",
)
@click.option(
    "--keep-models",
    type=click.Choice(["none", "best", "all"]),
    default="best",
    show_default=True,
    help="Merged models that stay on the disk.",
)
@click.option("--include-path", type=click.Path(path_type=Path), help="lm-eval: your own tasks.")
@click.option("--limit", type=float, help="lm-eval: examples a task, or a share below 1.")
@click.option("--num-fewshot", type=int, help="lm-eval: examples in the prompt.")
@click.option("--apply-chat-template", is_flag=True, help="lm-eval: use the tokenizer's template.")
@click.option("--batch-size", help="lm-eval: a number or auto.")
@click.option("--device", help="lm-eval: such as cuda:0.")
@click.option("--dtype", help="lm-eval: dtype in which models are loaded.")
@click.option(
    "--merge-option",
    "merge_options",
    multiple=True,
    metavar="OPTION",
    help="Passed on to mergekit, such as --merge-option=--cuda.",
)
def compare(
    recipe: Path,
    more_grid: tuple[str, ...],
    methods: str,
    tasks: str | None,
    evaluator: str | None,
    also: tuple[Path, ...],
    out: Path,
    fixed: tuple[str, ...],
    grid: tuple[str, ...],
    keep_models: str,
    merge_options: tuple[str, ...],
    **lm_eval: Any,
) -> None:
    """Merge RECIPE by several methods, evaluate each result, and report.

    Parameters that a method lacks are left out of its recipe, those that the recipe lacks get the
    method's defaults (`weight`, which has none in mergekit: 1/number of models). Every recipe is
    kept in OUT/<method>/recipe.yaml. Started again, the same command goes on where it stopped.
    """
    from cart_plugin.compare import request as asked
    from cart_plugin.compare.report import report, write_report
    from cart_plugin.compare.steps import ask

    terminal = console()
    try:
        request = asked.evaluator_request(tasks, evaluator, lm_eval)
        comparison = asked.comparison_of(
            recipe,
            asked.names(methods),
            fixed,
            (*grid, *more_grid),
            request,
            out,
            keep_models,
            merge_options,
            also,
        )
        asked.check_inputs(comparison)
        asked.check_disk(comparison)
        if out.exists() and not out.is_dir():
            raise CartError(f"--out {out} is a file; name a folder")
        out.mkdir(parents=True, exist_ok=True)
        click.get_current_context().call_on_close(asked.locked(out).release)
        with terminal.status("checking the evaluator"):
            sources = ask(comparison.request, None, out)
        comparison = replace(comparison, request={**comparison.request, **sources})
    except (CartError, OSError) as error:
        raise click.ClickException(str(error)) from None
    rows = comparison.rows()
    _run(comparison, rows, terminal)
    write_report(report(comparison, rows, recipe), out)
    terminal.print(f"report: {out / 'report.html'} (also report.md, report.json)", soft_wrap=True)
    if all(row.state == "failed" for row in rows if row.kind == "merged"):
        raise click.exceptions.Exit(1)


def _run(comparison: Comparison, rows: list[Row], terminal: Console) -> None:
    """Do the comparison under a live table; in a log, a line for each finished row."""
    if not terminal.is_terminal:
        told: set[str] = set()

        def tell() -> None:
            for row in rows:
                if row.state in ("done", "failed") and row.name not in told:
                    told.add(row.name)
                    terminal.print(_line(row), soft_wrap=True, markup=False)

        comparison.run(rows, tell)
        terminal.print(_table(rows))
        return
    from rich.live import Live

    with Live(_table(rows), console=terminal, refresh_per_second=4) as live:
        comparison.run(rows, lambda: live.update(_table(rows)))


def _line(row: Row) -> str:
    if row.error:
        return f"{row.name}: failed: {row.error}"
    mean = "" if row.mean is None else f" {row.mean:.3f}"
    return f"{row.name}:{mean}" + (f" ({row.note})" if row.note else "")


def _table(rows: list[Row]) -> RenderableType:
    from rich.markup import escape
    from rich.table import Table

    from cart_plugin.compare.report import tasks
    from cart_plugin.compare.steps import title_of

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("mean", justify="right")
    names = tasks(rows)
    for name in names:
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_column("")
    means = [row.mean for row in rows if row.kind == "merged" and row.mean is not None]
    for row in rows:
        state = {"done": "", "failed": f"[red]failed: {escape(row.error)}[/red]"}.get(
            row.state, f"[dim]{row.state}[/dim]"
        )
        is_best = row.kind == "merged" and row.mean is not None and row.mean == max(means)
        table.add_row(
            escape(title_of(row.name)),
            "" if row.mean is None else f"{row.mean:.3f}",
            *(f"{row.metrics[name]['value']:.3f}" if name in row.metrics else "" for name in names),
            state,
            style="bold" if is_best else "",
        )
    return table
