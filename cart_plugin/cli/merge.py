"""`mergekit-cart merge`: one recipe, merged whole whatever its architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cart_plugin.cli.console import console, print_section, transfers
from cart_plugin.errors import CartError


class MergeCommand(click.Command):
    """A command with mergekit's own options, which are read when it is run or asked for help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the arguments; if they are for several workers here, Ray starts in the meantime."""
        ctx.obj = start = _start_of_ray(ctx, self.params, args)
        if start is None:
            return super().parse_args(ctx, args)
        try:
            rest = super().parse_args(ctx, args)
        except BaseException:
            start.end()
            raise
        ctx.call_on_close(start.end)
        return rest

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Its own parameters, then mergekit's."""
        from mergekit.options import add_merge_options

        known = super().get_params(ctx)
        theirs = click.command()(add_merge_options(lambda merge_options: merge_options)).params
        return [*known[:-1], *theirs, known[-1]]  # --help stays last


def _start_of_ray(ctx: click.Context, own: list[click.Parameter], args: list[str]) -> Any:
    """Ray, which takes as long to start as mergekit, with its options, takes to be imported."""
    if set(args) & set(ctx.help_option_names):
        return None
    early = click.Command(
        ctx.info_name,
        params=[*own, click.Option(["-v", "verbosity"], count=True)],  # as mergekit has it
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    # Nothing is refused here: what is wrong is told where all is read.
    found = early.make_context(ctx.info_name, list(args), resilient_parsing=True).params
    workers, address, recipe = (found.get(name) for name in ("workers", "address", "recipe"))
    if not isinstance(workers, int) or workers < 2 or address is not None:
        return None
    if not isinstance(recipe, Path) or not recipe.is_file():
        return None  # there will be nothing to do
    from cart_plugin.distributed.start import Start

    return Start(workers, None, logs=bool(found.get("verbosity")))


@click.command(cls=MergeCommand, short_help="Merge a recipe whole, whatever its architecture.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Go on where the doctor finds a problem.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Merge N parts at once (by Ray, if N is above 1), and go on where a run was killed.",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Let a Ray cluster do it: `auto` or HOST:PORT. Its nodes have to share all folders.",
)
@click.option(
    "--gpus",
    type=float,
    default=0.0,
    metavar="SHARE",
    help="Each worker's share of a GPU: 1, or 0.5 for two workers on one.",
)
@click.pass_obj
def merge(
    start: Any,
    recipe: Path,
    out: Path,
    force: bool,
    workers: int | None,
    address: str | None,
    gpus: float,
    **options: Any,
) -> None:
    """Merge RECIPE (mergekit's YAML, any of its methods) into the new folder OUT.

    The doctor looks at the recipe first, and a problem ends the merge before it starts.

    The tensors are merged as mergekit-yaml does where its plan keeps all of them, else one by one:
    mergekit 0.1.5 cannot plan some architectures, and drops tensors of others without a word. The
    last line says which, and why. `model+adapter` inputs are fused first; with --lora-merge-cache
    they are kept, by what is in them, for other merges.

    Config, tokenizer, chat template, processors and generation config come from the base model, or
    else the first one. Then everything is checked: each tensor that the inputs share is there, of
    the right shape and finite, and the model's class takes what is there. OUT appears whole or not
    at all. Exit code 1, and one line that says why, if that fails.

    With --workers or --ray the result is made in parts, and the same command goes on where a run
    was killed; see docs/distributed.md.
    """
    from mergekit.options import MergeOptions

    from cart_plugin.execution import request

    terminal = console()
    try:
        settings = MergeOptions(**options)
        problems = request.examine(
            recipe, out, lambda section: print_section(terminal, section), settings
        )
        terminal.print()
        if problems and not force:
            raise CartError(
                f"not merged: {problems[0].fact}"
                + (f" (and {len(problems) - 1} more above)" if len(problems) > 1 else "")
                + "; solve it, or pass --force"
            )
        if workers is None and address is None:
            if gpus:
                raise CartError("--gpus is for --workers or --ray; mergekit's own option is --cuda")
            with terminal.status("merging") as status:
                done = request.run(
                    recipe,
                    out,
                    settings,
                    force=force,
                    tell=lambda line: status.update(f"merging: {line[: terminal.width - 20]}"),
                    log=lambda text: click.echo(text, err=True),
                )
        else:
            from cart_plugin.distributed import request as distributed

            hands = distributed.Hands(workers, address, gpus, start)
            with transfers(terminal, quiet=settings.quiet) as shown:
                listener = distributed.Listener(
                    shown.tell, shown.note, shown.show, lambda text: click.echo(text, err=True)
                )
                done = distributed.run(recipe, out, settings, hands, listener, force=force)
    except (ValueError, OSError) as error:  # pydantic's are of the first kind too
        # Names of a broken file may hold anything, line breaks too.
        raise click.ClickException(" ".join(str(error).split())) from None
    for text in done.warnings:
        click.echo(f"warning: {text}", err=True)
    way = "by mergekit's plan" if not done.note else "tensor by tensor"
    terminal.print(
        f"wrote {out}: {done.tensors:,} tensors, merged {way}: {done.reason}",
        soft_wrap=True,
        markup=False,
    )
