"""The report of an inspection: `report.json`, and from it alone the page, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cart_plugin.checkpoints.files import write_json, write_text
from cart_plugin.inspect import summary
from cart_plugin.inspect.advice import Advice, advise
from cart_plugin.inspect.journal import KIND, REPORT
from cart_plugin.inspect.measures import RATIOS, Record
from cart_plugin.inspect.merges import MERGED
from cart_plugin.inspect.page import WORDS, Table, html
from cart_plugin.inspect.state_dicts import rows_of
from cart_plugin.inspect.weighting import Weighting

if TYPE_CHECKING:
    from rich.console import RenderableType

_WORST = 20  # of the table in files
_ON_PAGE = 3
_NEAR = 5  # pairs in files
_SIDE_BY_SIDE = 6  # models whose figures a page has beside one another


@dataclass
class Report:
    """What `inspect_models` has found.

    Attributes:
        models: paths by name.
        base: the base model's path; None without one.
        merged: that of a merged model that is judged.
        key: of all that decides the records.
        of_adapters: the models are adapters.
        records: one a weight, in the models' order.
        notes: what a user has to know.
        weighting: how much each model counts in merges; None for alike.
        of_pool: the models are those of a pool of FusionBench.
        seconds: of the work.
    """

    models: Mapping[str, str]
    base: str | None
    merged: str | None
    key: str
    of_adapters: bool
    records: Sequence[Record]
    notes: list[str] = field(default_factory=list)
    weighting: Weighting | None = None
    of_pool: bool = False
    seconds: float = 0.0

    @property
    def names(self) -> list[str]:
        """The models' names."""
        return list(self.models)

    @property
    def centre(self) -> str:
        """What differences are from, in words."""
        if self.base is not None or self.of_adapters:
            return "the base"
        return "the weighted average" if self.weights() else "the average"

    def weights(self) -> dict[str, tuple[float, float]]:
        """The least and the largest weight of each model, 1 on average; empty for equal ones."""
        return summary.weights(self.records, self.names)

    def movements(self) -> list[summary.Movement]:
        """How far each model moved."""
        return summary.movements(self.records, self.names)

    def pairs(self) -> list[summary.Pair]:
        """All pairs of models, the nearest first."""
        return summary.pairs(self.records, self.names)

    def judgements(self, kind: str | None = None) -> dict[str, summary.Judgement]:
        """What each method keeps; see `summary.judgements`."""
        return summary.judgements(self.records, kind)

    def worst(self) -> tuple[str, list[summary.Worst]]:
        """The method that is looked at, and the weights in which it loses most.

        The merged model if there is one, else the recommended method.
        """
        method = MERGED if self.merged is not None else self.advice().method
        return method, summary.worst(self.records, self.names, method)

    def advice(self) -> Advice:
        """Which method fits."""
        return advise(
            self.movements(),
            self.pairs(),
            self.judgements(),
            list(self.models.values()),
            self.base,
            of_adapters=self.of_adapters,
            of_pool=self.of_pool,
            weighting=self.weighting if self.weights() else None,
        )

    def rows(self) -> list[dict[str, Any]]:
        """A row for each decomposed weight and model, for `pandas.DataFrame`."""
        return [row for record in self.records for row in rows_of(record, self.names)]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        from cart_plugin import __version__

        method, worst = self.worst()
        advice = self.advice()
        return {
            "kind": KIND,
            "key": self.key,
            "version": __version__,
            "models": dict(self.models),
            "base": self.base,
            "merged": self.merged,
            "of_adapters": self.of_adapters,
            "weights": self.weights(),
            "seconds": self.seconds,
            "notes": self.notes,
            "movements": [asdict(entry) for entry in self.movements()],
            "pairs": [asdict(entry) for entry in self.pairs()],
            "methods": {
                name: asdict(found) | {"mean_kept": found.mean_kept, "mean_lost": found.mean_lost}
                for name, found in self.judgements().items()
            },
            "measured": {
                name: asdict(found) for name, found in self.judgements("measured").items()
            },
            "ratios": list(RATIOS),
            "curves": {
                kind: summary.curves(self.records, kind) for kind in ("centred", "from_base")
            },
            "worst": {"method": method, "weights": [asdict(entry) for entry in worst[:_WORST]]},
            "advice": asdict(advice),
            "records": list(self.records),
        }

    def write(self, out: Path) -> None:
        """Write the files into a folder."""
        found = self.document()
        write_text(out / "report.md", self.markdown())
        write_text(
            out / "report.html", html(found, list(self._tables(on_page=False)), self.words())
        )
        write_json(out / REPORT, found)  # last: it says that all is there

    def tables(self) -> list[RenderableType]:
        """The page for a terminal."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        found: list[RenderableType] = []
        for heading, columns, rows in self._tables(on_page=True):
            table = RichTable(box=None, pad_edge=False, header_style="bold", title_justify="left")
            table.add_column(escape(heading), overflow="fold")
            for column in columns:
                justify: Any = "left" if column == WORDS else "right"
                table.add_column(escape(column), justify=justify, overflow="fold")
            for row in rows:
                table.add_row(*map(escape, row))
            found.append(table)
        return found

    def _tables(self, *, on_page: bool) -> Iterator[Table]:
        """All tables; those of a page are short, and no wider for many models."""
        yield self._movements()
        yield self._nearest(1 if on_page else _NEAR)
        narrow = on_page and len(self.names) > _SIDE_BY_SIDE
        for kind, words in ((None, "kept by"), ("measured", "kept on the inputs by")):
            if judged := self.judgements(kind):
                yield self._kept(words, judged, narrow=narrow)
        method, losses = self.worst()
        if losses:
            yield (
                f"most lost by {summary.title(method)}",
                ["of", "kept", "lost", "adds"],
                [
                    [
                        *(entry.tensor, entry.model, _signed(entry.kept)),
                        *(f"{entry.lost:.0%}", f"{entry.adds:.1%}"),
                    ]
                    for entry in losses[: _ON_PAGE if on_page else _WORST]
                ],
            )

    def _movements(self) -> Table:
        return (
            "model",
            ["moved", "rank", "in 8 %", WORDS],
            [
                [
                    entry.model,
                    f"{entry.moved:.3g}" if entry.share is None else f"{entry.share:.2%}",
                    str(entry.rank) if entry.rank else f"~{entry.effective_rank:.0f}",
                    f"{entry.energy:.0%}",
                    summary.where(entry),
                ]
                for entry in self.movements()
            ],
        )

    def _nearest(self, count: int) -> Table:
        return (
            "pair",
            ["apart", "cosine", "common inputs", "common outputs"],
            [
                [
                    " and ".join(pair.models),
                    f"{pair.apart:.0%}",
                    _signed(pair.cosine, ".2f"),
                    f"{pair.row_overlap:.0%}",
                    f"{pair.column_overlap:.0%}",
                ]
                for pair in self.pairs()[:count]
            ],
        )

    def _kept(self, words: str, judged: Mapping[str, summary.Judgement], *, narrow: bool) -> Table:
        """A row a method: of each model or, narrow, the mean and the one that keeps least."""

        def cells(found: summary.Judgement) -> list[str]:
            if not narrow:
                return ["-" if share is None else _signed(share) for share in found.kept]
            name = self.names[found.kept.index(found.least_kept)]
            return [_signed(found.mean_kept), _signed(found.least_kept), name]

        return (
            words,
            [*(["mean", "least", "of"] if narrow else self.names), "lost"],
            [
                [summary.title(method), *cells(found), f"{found.mean_lost:.0%}"]
                for method, found in judged.items()
            ],
        )

    def words(self) -> list[str]:
        """What the tables show, in sentences."""
        known = all(entry.share is not None for entry in self.movements())
        relative = "relative to the weights" if known else "its norm (with --base: of the weights')"
        found = [
            f"moved: the difference from {self.centre}, {relative}",
            "rank: of all changes where that is low, else (~) of as many equally strong directions "
            "at most",
            "in 8 %: share of the squared difference that the strongest 8 % of the directions hold",
            "apart: how far one model is from the other, of what the farther one moved; common "
            "inputs and outputs: how much of their leading directions two models share",
            "kept: share of a model's own answer that is in the merge's, on the inputs that its "
            "own difference points at",
            "lost: what the merge answers otherwise, squared, relative to the model's own answer "
            "(that of its difference)",
            "adds: what a weight adds to what the model loses",
        ]
        if self.base is None and not self.of_adapters:
            found.append(
                "no base model was named: R and I of the differences from it are left out, and "
                "everything is told of the differences from the average"
            )
        if weights := self.weights():
            spans = (
                f"{name} {least:.2g}" + (f" to {most:.2g}" if most - least > 0.01 else "")
                for name, (least, most) in weights.items()
            )
            found.append(
                f"weights, 1 on average, by which merges count the models: {', '.join(spans)}"
            )
        return found

    def markdown(self) -> str:
        """The same as Markdown."""
        lines = [f"# {', '.join(self.names)}: inspected", ""]
        for heading, columns, rows in self._tables(on_page=False):
            lines.append(_line([heading, *columns]))
            lines.append(_line(["---", *["---:"] * len(columns)]))
            lines += [_line(row) for row in rows]
            lines.append("")
        lines += [f"- {text}" for text in self.words()] + [""]
        advice = self.advice()
        lines += [
            f"Recommended: {summary.title(advice.method)}",
            "",
            "```sh" if advice.recipe.startswith("mergekit-cart") else "```yaml",
            advice.recipe,
            "```",
        ]
        lines += ["", *(f"- {reason}" for reason in [*advice.reasons, *self.notes]), ""]
        return "\n".join(lines)


def _signed(value: float, form: str = ".0%") -> str:
    """A number that may be negative; nothing has no sign."""
    text = format(value, form)
    return text if any(digit in text for digit in "123456789") else text.removeprefix("-")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
