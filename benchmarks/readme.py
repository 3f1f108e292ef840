"""Copy result tables into README.md and docs/: `python -m benchmarks.readme` (`make readme`).

A page marks each place with the file that belongs there, so that no figure is typed by hand:

    <!-- from benchmarks/results/demo/table.md -->
    ...
    <!-- end -->
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^(<!-- from (\S+) -->\n).*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_WIDTH = 125


def pages(root: Path = ROOT) -> list[Path]:
    """What is filled: the front page, the guide, and the benchmarks' index if there is one."""
    index = root / "benchmarks" / "README.md"
    guide = sorted((root / "docs").glob("*.md"))
    return [root / "README.md", *guide, *([index] if index.exists() else [])]


def filled(text: str, root: Path = ROOT) -> str:
    """The text with every marked block replaced by its file's content, its prose wrapped.

    Marks inside of code blocks are left as they are.

    Raises:
        FileNotFoundError: a block names a file that does not exist.
    """
    parts, place = [], 0
    for code in _CODE.finditer(text):
        parts += [_filled(text[place : code.start()], root), code[0]]
        place = code.end()
    return "".join([*parts, _filled(text[place:], root)])


def _filled(text: str, root: Path) -> str:
    def fill(block: re.Match[str]) -> str:
        content = (root / block[2]).read_text().strip()
        return f"{block[1]}\n{_wrapped(content)}\n\n{block[3]}"

    return _BLOCK.sub(fill, text)


def _wrapped(text: str) -> str:
    """Prose in lines that a terminal shows; tables, headings and lists as they are."""
    return "\n".join(
        line
        if line.startswith(("|", "#", "-"))
        else textwrap.fill(line, _WIDTH, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def main() -> None:
    """Rewrite the pages in place."""
    for page in pages():
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
