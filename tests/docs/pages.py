"""The pages that users read, and what they hold."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.readme import ROOT, pages

FILLED = {str(page.relative_to(ROOT)): page.read_text() for page in pages()}
READ = {
    **FILLED,
    **{
        str(page.relative_to(ROOT)): page.read_text()
        for page in sorted((ROOT / "configs").rglob("README.md"))
    },
}
_CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return [code for found, code in _CODE.findall(text) if found == language]


def all_blocks(language: str) -> list[tuple[str, str]]:
    """Each page with code of a language, and each of its blocks."""
    return [(page, code) for page, text in FILLED.items() for code in blocks(text, language)]


def prose(text: str) -> str:
    """What is no code block."""
    return _CODE.sub("", text)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 1
        while name in found:
            name, number = f"{name.removesuffix(f'-{number - 1}')}-{number}", number + 1
        found.add(name)
    return found


def commands() -> list[tuple[str, str]]:
    """Each command line of the shell blocks and transcripts, with the page it stands on."""
    lines = []
    for page, text in FILLED.items():
        shell = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
        typed = re.findall(r"^\$ (.+)$", "\n".join(blocks(text, "text")), re.MULTILINE)
        for line in [*shell.splitlines(), *typed]:
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if command:
                lines.append((page, command))
    return lines


def target(page: str, link: str) -> Path:
    """The file or folder that a relative link leads to."""
    return (ROOT / page).parent / link
