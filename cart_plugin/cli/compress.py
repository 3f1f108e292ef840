"""`mergekit-cart compress`: T fine-tuned models become one base and T small PEFT adapters."""

from __future__ import annotations

from pathlib import Path

import click

from cart_plugin.cli.console import console, print_report, progress
from cart_plugin.errors import CartError


class Percent(click.ParamType):
    """A share, written as `20%` or `0.2`."""

    name = "share"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The share as a number."""
        text = str(value).strip()
        percent = text.endswith("%")
        try:
            found = float(text.removesuffix("%"))
        except ValueError:
            self.fail(f"{text!r} is no share such as 20% or 0.2", param, ctx)
        if found > 1 and not percent:
            self.fail(f"{text} is more than the whole; write {text}% for per cent", param, ctx)
        return found / 100 if percent else found


@click.command(short_help="Turn fine-tuned models into one base and a PEFT adapter each.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=click.Path())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--base",
    metavar="MODEL",
    type=click.Path(path_type=Path),
    help="Folder of the model to be the base, such as the pretrained one [the MODELs' average].",
)
@click.option("--rank-ratio", type=float, help="Share of the singular directions kept [0.08].")
@click.option("--rank", type=int, help="Their number instead.")
@click.option("--energy", type=float, help="Share of the squared singular values kept instead.")
@click.option(
    "--target-size",
    type=Percent(),
    metavar="PERCENT",
    help="Instead: base and adapters together, of the models' size, with the least error.",
)
@click.option(
    "--layout",
    type=click.Choice(["peft", "servers"]),
    default="peft",
    show_default=True,
    help="All that PEFT can hold, or what vLLM, SGLang and llama.cpp load, too: A and B of linear "
    "layers alone, of one rank.",
)
@click.option("--names", help="The adapters' names, with commas between [the folders' names].")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of base and adapters [the models' own].",
)
@click.option(
    "--drop-small",
    is_flag=True,
    help="Leave norms, biases, embeddings and heads as the base has them: adapters of LoRA alone.",
)
@click.option(
    "--small-error",
    type=Percent(),
    default=0.0,
    metavar="PERCENT",
    help="Leave those of them that differ from the base by at most this (such as 1%), relatively.",
)
@click.option(
    "--svd",
    type=click.Choice(["auto", "exact", "fast", "subspace", "sketch"]),
    default="auto",
    show_default=True,
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the solver.")
def compress(
    models: tuple[str, ...],
    out: Path,
    base: Path | None,
    rank_ratio: float | None,
    rank: int | None,
    energy: float | None,
    target_size: float | None,
    layout: str,
    names: str | None,
    dtype: str | None,
    drop_small: bool,
    small_error: float,
    svd: str,
    seed: int,
) -> None:
    """Turn fine-tuned MODELs of one architecture into OUT/base and OUT/adapters/NAME.

    The base is their average, or the model of --base, as an ordinary checkpoint; the adapters are
    ordinary PEFT LoRA, loaded with PeftModel.from_pretrained(base, adapter). `mergekit-cart expand`
    gives full models back. Nothing appears under OUT before all is done.
    """
    from cart_plugin.checkpoints.servers import summary
    from cart_plugin.compress import compress as run

    terminal = console()
    try:
        with progress() as tell:
            report = run(
                models,
                out,
                names=None if names is None else [name.strip() for name in names.split(",")],
                base=base,
                rank_ratio=rank_ratio,
                rank=rank,
                energy=energy,
                target_size=target_size,
                layout=layout,
                dtype=dtype,
                drop_small=drop_small,
                small_error=small_error,
                svd=svd,
                seed=seed,
                progress=tell,
            )
    except CartError as error:
        raise click.ClickException(str(error)) from None
    print_report(terminal, report)
    terminal.print(
        f"{report.share:.1%} of {len(report.tasks)} models in {report.seconds['total']:.0f} s: "
        f"{out} (also report.json)",
        soft_wrap=True,
        markup=False,
    )
    terminal.print(summary(report.loaders), soft_wrap=True, markup=False)
