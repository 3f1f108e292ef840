"""The index of the benchmarks names what there is."""

import re

from benchmarks.readme import ROOT

INDEX = ROOT / "benchmarks" / "README.md"
TEXT = INDEX.read_text()


def test_linked_files_and_sections_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 40
    files = [link for link in links if not link.startswith("#")]
    assert not [link for link in files if not (INDEX.parent / link).exists()]
    sections = {f"#{title}" for title in re.findall(r"^## (\w+)$", TEXT, re.MULTILINE)}
    assert {link for link in links if link.startswith("#")} == sections


def test_every_benchmark_is_in_it_with_its_target() -> None:
    targets = set(
        re.findall(r"^(demo|bench-[a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    assert set(re.findall(r"`make ([a-z-]+)`", TEXT)) == targets


def test_all_notes_and_tables_are_linked() -> None:
    folder = INDEX.parent
    found = {
        path.relative_to(folder).as_posix()
        for pattern in ("notes/*.md", "results/**/*.md")
        for path in folder.glob(pattern)
    }
    assert not {path for path in found if f"({path})" not in TEXT}


def test_lines_fit_a_terminal() -> None:
    assert not [line for line in TEXT.splitlines() if len(line) > 160]


def test_results_lie_where_their_benchmarks_do() -> None:
    code = {path.name for path in INDEX.parent.iterdir() if path.is_dir()}
    assert {path.name for path in (INDEX.parent / "results").iterdir()} <= code
