"""How well each of the twenty encoders does its task, and the pretrained one: validation split."""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.common.provenance import made_by
from benchmarks.common.record import Record, conditions
from benchmarks.common.tables import markdown_table
from benchmarks.suites import load_encoders
from benchmarks.twenty.suite import ORDER
from benchmarks.vision.strength import strength
from benchmarks.vision.tasks import TASKS

EXAMPLES = 300  # a task


def strengths(seed: int, folder: Path) -> None:
    """Judge each encoder, fine-tuned now if need be, on its own task; known ones are not redone."""
    known = conditions((), ("torch", "transformers"), timed=False, examples=EXAMPLES)
    record = Record(folder / f"strength-{seed}.json", known)
    for task in ORDER:
        if task in record.cases:
            continue
        held = load_encoders("vision", seed, "validation", EXAMPLES, [task])
        settings = strength(task)
        case = {
            "images": settings.images,
            "epochs": settings.epochs,
            "pretrained": held.judge(held.base(), [task])[task],
            "individual": held.judge(held.tuned[task], [task])[task],
        }
        record.put(task, case)
        click.echo(f"seed {seed}, {task}: {case['pretrained']:.3f}, {case['individual']:.3f}")


def markdown(path: Path) -> str:
    """The table of a seed's record."""
    record = json.loads(path.read_text())
    rows = [
        [
            TASKS[task].title,
            str(TASKS[task].classes),
            f"{case['images']} x {case['epochs']}",
            f"{100 * case['pretrained']:.1f}",
            f"{100 * case['individual']:.1f}",
        ]
        for task, case in record["cases"].items()
    ]
    heading = ["task", "classes", "images x epochs", "pretrained", "fine-tuned"]
    table = markdown_table(heading, rows, ["---", *["---:"] * 4])
    return (
        f"Validation accuracy in per cent ({EXAMPLES} images a task, the first seed) of the twenty "
        "image encoders on their own tasks, and of what they were fine-tuned from. "
        f"{made_by('bench-twenty', record['measured'])}\n\n{table}\n"
    )
