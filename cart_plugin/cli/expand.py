"""`mergekit-cart expand`: the full checkpoint of one task, from a base and its adapter."""

from __future__ import annotations

from pathlib import Path

import click

from cart_plugin.cli.console import console, progress
from cart_plugin.errors import CartError


@click.command(short_help="Write the full checkpoint of one compressed model.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path))
def expand(folder: Path, name: str, out: Path) -> None:
    """Write the full checkpoint of task NAME, compressed in DIR, to OUT."""
    from cart_plugin.compress import expand as run

    try:
        with progress() as tell:
            run(folder, name, out, progress=tell)
    except CartError as error:
        raise click.ClickException(str(error)) from None
    console().print(f"wrote {out}", soft_wrap=True, markup=False)
