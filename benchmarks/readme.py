"""Copy result tables into README.md: `python -m benchmarks.readme` (`make readme`).

The README marks each place with the file that belongs there, so that no figure is typed by hand:

    <!-- from benchmarks/results/demo/table.md -->
    ...
    <!-- end -->
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, root: Path = ROOT) -> str:
    """The text with every marked block replaced by its file's content.

    Raises:
        FileNotFoundError: a block names a file that does not exist.
    """
    return _BLOCK.sub(
        lambda block: block[1] + "\n" + (root / block[2]).read_text().strip() + "\n\n" + block[3],
        text,
    )


def main() -> None:
    """Rewrite README.md in place."""
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))


if __name__ == "__main__":
    main()
