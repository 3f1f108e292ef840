"""`report.html`: one self-contained page, drawn by a script of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cart_plugin.inspect.measures import Record
from cart_plugin.inspect.summary import decomposed, entry_of, title

if TYPE_CHECKING:
    from markupsafe import Markup

Table = tuple[str, list[str], list[list[str]]]
"""Heading of the first column, of the others, and rows."""

WORDS = "most in"
"""The column that holds words and no number."""

_TITLES = {
    "model": "How far, and where",
    "pair": "The nearest pairs",
    "kept by": "What merges keep of each model",
    "kept on the inputs by": "The same, measured on the inputs",
}
_DRAWN = (
    *("tensor", "layer", "module", "shape", "full_rank", "moved", "effective_rank", "rank"),
    *("rho", "row_overlap", "ranks", "centred", "from_base", "spectrum"),
)


def html(found: Mapping[str, Any], tables: Sequence[Table], words: Sequence[str]) -> str:
    """The page.

    Args:
        found: from `Report.document`.
        tables: those of the other forms of the report.
        words: what they show.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("cart_plugin.inspect", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("report.html.j2").render(
        found=found,
        tables=tables,
        titles=_TITLES,
        words=words,
        in_words=WORDS,
        chosen=title(found["advice"]["method"]),
        from_base=found["base"] is not None or found["of_adapters"],
        data=_drawn(found),
    )


def _breakable(name: str) -> Markup:
    """A name that breaks where its parts end; copied, it is as it was."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[._])", name))


def _drawn(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the script draws."""
    return {
        "models": list(found["models"]),
        "methods": [[name, title(name)] for name in found["methods"]],
        "chosen": found["worst"]["method"],
        # To two digits nothing has no sign.
        "pairs": [pair | {"cosine": round(pair["cosine"], 2) + 0.0} for pair in found["pairs"]],
        "records": [_slim(record, found["methods"]) for record in decomposed(found["records"])],
    }


def _slim(record: Record, methods: Iterable[str]) -> dict[str, Any]:
    entries = {name: entry_of(record, name) for name in methods}
    kept = {name: {key: entry[key] for key in ("kept", "lost")} for name, entry in entries.items()}
    return {key: record[key] for key in _DRAWN} | {"methods": kept}
