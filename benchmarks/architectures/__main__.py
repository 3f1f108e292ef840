"""`make bench-architectures`: what merges whole, by mergekit-yaml and by mergekit-cart merge."""

from __future__ import annotations

import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks.architectures import REVISION, cases
from benchmarks.common.measure import RESULTS
from benchmarks.common.record import MERGES, Record, conditions
from benchmarks.common.tables import markdown_table

FOLDER = RESULTS / "architectures"
PACKAGES = ("mergekit", "transformers", "torch", "safetensors")


@click.command()
@click.argument("names", nargs=-1)
@click.option("--anew", is_flag=True, help="Forget what is known.")
def main(names: tuple[str, ...], anew: bool) -> None:
    """Merge each architecture, or those of NAMES; the exit code is 1 if one is not whole."""
    current = conditions(MERGES, PACKAGES, timed=False, revision=REVISION)
    record = Record(FOLDER / "record.json", current, resume=not anew)
    cases.import_all()
    for name in names or cases.ARCHITECTURES:
        for form in cases.FORMATS:
            key = f"{name} | {form}"
            if key in record.cases and not names:
                continue
            with tempfile.TemporaryDirectory() as place:
                found = cases.run_case(name, form, Path(place))
            record.put(key, found)
            print(key, _line(found), flush=True)
    (FOLDER / "table.md").write_text(table(record.cases) + "\n")
    missed = [
        key for key, case in record.cases.items() if case and not cases.is_whole(case["merge"])
    ]
    print(summary(record.cases))
    sys.exit(bool(missed))


def table(known: dict[str, Any]) -> str:
    """The cases as Markdown, under what they come to."""
    heading = (
        "architecture",
        "saved as",
        "`mergekit-yaml`",
        "doctor",
        "`mergekit-cart merge`",
        "route",
    )
    rows = []
    for name, form in product(cases.ARCHITECTURES, cases.FORMATS):
        case = known.get(f"{name} | {form}")
        if case is None:
            continue
        rows.append(
            (
                name,
                form,
                _verdict(case["mergekit-yaml"]),
                _doctor(case),
                _verdict(case["merge"]),
                "tensor by tensor" if "tensor by tensor" in case["merge"]["said"] else "plan",
            )
        )
    return f"{summary(known)}\n\n{markdown_table(heading, rows)}"


def summary(known: dict[str, Any]) -> str:
    """How many cases are whole, and where the doctor is wrong."""
    found = [case for case in known.values() if case is not None]
    names = {key.split(" | ")[0] for key, case in known.items() if case is not None}
    whole = [case for case in found if cases.is_whole(case["mergekit-yaml"])]
    ours = [case for case in found if cases.is_whole(case["merge"])]
    missed = [case for case in found if _is_missed(case)]
    alarms = [case for case in found if _is_false_alarm(case)]
    return (
        f"{len(names)} architectures, {len(found)} cases with both formats. Whole: `mergekit-yaml` "
        f"{len(whole)}, `mergekit-cart merge` {len(ours)}. The doctor missed {len(missed)} "
        f"failures and gave {len(alarms)} false alarms."
    )


def _weights_whole(case: dict[str, Any]) -> bool:
    found = case["mergekit-yaml"]
    return bool(found["code"] == 0 and not found["wrong"])


def _is_missed(case: dict[str, Any]) -> bool:
    return not _weights_whole(case) and case["doctor"]["code"] == 0


def _is_false_alarm(case: dict[str, Any]) -> bool:
    return _weights_whole(case) and case["doctor"]["code"] != 0


def _doctor(case: dict[str, Any]) -> str:
    verdict = "problem" if case["doctor"]["code"] else "no problem"
    if _is_missed(case):
        return f"**{verdict} (missed)**"
    return f"**{verdict} (false alarm)**" if _is_false_alarm(case) else verdict


def _verdict(found: dict[str, Any]) -> str:
    if found["code"] != 0:
        return "crash" if isinstance(found["code"], int) else "hangs"
    if found["wrong"]:
        return f"loses {found['wrong']} of {found['tensors']}"
    return "whole" if found.get("processor", True) else "whole, no processor"


def _line(case: dict[str, Any] | None) -> str:
    if case is None:
        return "as before"
    parts = [f"yaml: {_verdict(case['mergekit-yaml'])}", f"doctor: {_doctor(case)}"]
    parts.append(f"merge: {_verdict(case['merge'])}")
    if not cases.is_whole(case["merge"]):
        parts.append(case["merge"]["said"])
    return "; ".join(parts)


if __name__ == "__main__":
    main()
