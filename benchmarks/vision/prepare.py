"""`python -m benchmarks.vision.prepare`: fetch, render and fine-tune what the benchmarks need."""

from __future__ import annotations

import os

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the cache folder


@click.command()
@click.option(
    "--tasks", default="mnist,thai,georgian,hangul", show_default=True, help="Names, or 'all'."
)
@click.option("--seed", default=0, show_default=True, help="Of the fine-tuning.")
@click.option(
    "--workers", default=2, show_default=True, help="Tasks to fine-tune at the same time."
)
@click.option("--data-only", is_flag=True, help="Fetch and render, do not fine-tune.")
def main(tasks: str, seed: int, workers: int, data_only: bool) -> None:
    """Prepare tasks: images and one fine-tuned encoder each, as strongly as in the suite."""
    from benchmarks.common.sources import SourceError
    from benchmarks.vision.finetune import finetune_all
    from benchmarks.vision.strength import strength
    from benchmarks.vision.tasks import TASKS, prepare_task

    names = list(TASKS) if tasks == "all" else [name.strip() for name in tasks.split(",")]
    try:
        folders = {name: prepare_task(name) for name in names}
        if not data_only:
            strengths = {name: strength(name) for name in names}
            folders = finetune_all(names, seed, strengths, workers)
    except (SourceError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for name, folder in folders.items():
        click.echo(f"{name}: {folder}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.vision.prepare")
