"""Where figures come from: the version and the commit that they were measured with, and the day."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.common.measure import RESULTS

ROOT = Path(__file__).resolve().parents[2]
Provenance = dict[str, Any]


@lru_cache(maxsize=1)
def provenance() -> Provenance:
    """What this process measures with; the same to its end, whatever is committed meanwhile.

    Returns:
        `cart_plugin` (version), `commit` (None outside git, with `-dirty` at its end where tracked
        files differ from it) and `date`. Older results have `recorded_by` in the place of
        `commit`: that they were committed with, which is later than that they were measured at.
    """
    return {
        "cart_plugin": installed("cart-plugin"),
        "commit": commit(ROOT),
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
    }


def commit(root: Path) -> str | None:
    """The commit that a checkout stands at, or None; `-dirty` says that its files differ."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():  # a copy inside another repository
        return None
    found = _git(root, "rev-parse", "--short", "HEAD")
    # Results change while a benchmark runs, by itself.
    results = RESULTS.relative_to(ROOT).as_posix()
    changed = _git(root, "status", "--porcelain", "-uno", "--", ".", f":(exclude){results}")
    return f"{found}-dirty" if found and changed else found


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def installed(package: str) -> str | None:
    """The version of a distribution; None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def distinct(measured: Iterable[Mapping[str, Any]]) -> list[Provenance]:
    """Each provenance once, the oldest first, without the cases that a record gives beside it."""
    found: list[Provenance] = []
    for one in measured:
        plain = {name: value for name, value in one.items() if name != "cases"}
        if plain not in found:
            found.append(plain)
    return sorted(
        found, key=lambda one: (one["date"], one.get("commit") or one.get("recorded_by") or "")
    )


def made_by(target: str, measured: Iterable[Mapping[str, Any]], where: str = "") -> str:
    """The sentence of a table's caption that says how, where and when its figures were made.

    Args:
        target: of make.
        measured: all that the figures come from, as `provenance` gives it.
        where: such as ``on 2 cores``.
    """
    sittings: dict[tuple[str, str], list[str]] = {}
    for one in distinct(measured):
        how = "recorded in commit" if "recorded_by" in one else "commit"
        at = one.get("recorded_by") or one["commit"] or "unknown"
        start = f"cart-plugin {one['cart_plugin']}, {how}"
        sittings.setdefault((start, one["date"]), []).append(at)
    told = "; ".join(
        f"{start}{'s' if len(commits) > 1 else ''} {', '.join(commits)}, {date}"
        for (start, date), commits in sittings.items()
    )
    place = f" {where}" if where else ""
    return f"Made by `make {target}`{place} ({told})."
