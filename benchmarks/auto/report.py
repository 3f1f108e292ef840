"""The table and the plot of `carry`, from its results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.colors import CART_COLOR, LIMIT_COLOR
from benchmarks.common.provenance import made_by
from benchmarks.common.tables import markdown_table, percent_cell

AUTO = "CART without hyperparameters"
AUTO_COLOR = "#bf3989"
COLORS = {
    "average": "#9aa5b1",
    "CART, its defaults": "#d9a441",
    "CART, tuned here": CART_COLOR,
    AUTO: AUTO_COLOR,
    "fine-tuned": LIMIT_COLOR,
}


def write_report(result: Mapping[str, Any], folder: Path) -> None:
    """Write `carry.md` and `carry.png`."""
    from matplotlib import pyplot as plt

    (folder / "carry.md").write_text(markdown(result))
    figure = plot(result["settings"])
    figure.savefig(folder / "carry.png", dpi=150)
    plt.close(figure)


def markdown(result: Mapping[str, Any]) -> str:
    """One row a setting: accuracies, and the difference to CART tuned in that setting."""
    examples = result["examples"]
    rows = []
    for setting in result["settings"]:
        means = [percent_cell(setting["test"][title]) for title in COLORS]
        pairs = zip(setting["test"][AUTO], setting["test"]["CART, tuned here"], strict=True)
        difference = statistics.fmean(auto - tuned for auto, tuned in pairs)
        rows.append([setting["title"], *means, f"{100 * difference:+.1f}", setting["tuned"]])
    heading = ["models", *COLORS, "against tuned", "tuned to"]
    table = markdown_table(heading, rows, ["---", *["---:"] * (len(COLORS) + 1), "---"])
    return (
        f"Test accuracy in per cent ({examples['test']} examples a task), mean over fine-tuning "
        "seeds ± standard error where there are several. CART was tuned anew for each row on "
        f"{examples['validation']} validation examples a task of the first seed. "
        f"{made_by('bench-auto', result['measured'])}\n\n{table}\n"
    )


def plot(settings: Sequence[Mapping[str, Any]]) -> Any:
    """A group of points for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for place, (title, color) in enumerate(COLORS.items()):
        beside = 0.0 if title == "fine-tuned" else 0.09 * (place - 1.5)  # so that ties show
        means = [100 * statistics.fmean(setting["test"][title]) for setting in settings]
        style = {"marker": "_", "s": 300} if title == "fine-tuned" else {"s": 55}
        across = [position + beside for position in range(len(settings))]
        axes.scatter(across, means, color=color, label=title, zorder=3, **style)
    axes.set_xticks(
        range(len(settings)), [setting["title"].replace(", ", "\n") for setting in settings]
    )
    axes.set_ylabel("test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e7eb", zorder=0)
    figure.legend(frameon=False, loc="outside upper center", ncols=5)
    return figure
