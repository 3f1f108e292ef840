"""Links lead somewhere."""

import re

import pytest

from tests.docs.pages import READ, ROOT, anchors, prose, target


@pytest.mark.parametrize("page", READ)
def test_linked_files_and_headings_exist(page: str) -> None:
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(READ[page])):
        path, _, anchor = link.partition("#")
        file = target(page, path) if path else ROOT / page
        found = file.exists() and file.resolve().is_relative_to(ROOT)
        if not found or (anchor and anchor not in anchors(file.read_text())):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", [page for page in READ if page.startswith("docs/")])
def test_every_page_of_the_guide_is_in_its_index(page: str) -> None:
    name = page.removeprefix("docs/")
    assert name == "README.md" or f"]({name})" in READ["docs/README.md"]


def test_headings_are_named_as_github_names_them() -> None:
    text = "# A `b` c: d, e\n## [x](y.md)\n```sh\n# no heading\n```\n## x\n"
    assert anchors(text) == {"a-b-c-d-e", "x", "x-1"}
