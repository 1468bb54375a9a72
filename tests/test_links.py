"""Links in the documents: to files and headings of this repository. Addresses elsewhere are not asked."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.processes import REPOSITORY

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "nodes/*.md", "tests/chaos/*.md", "schemas/**/*.md", ".github/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\))?[^()\s]*)\)")
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)


def links(document: Path) -> list[str]:
    text = _CODE.sub("", _FENCED.sub("", document.read_text()))
    return [link for link in _LINK.findall(text) if not re.match(r"[a-z]+:", link)]


def anchors(document: Path) -> set[str]:
    """The headings' anchors as GitHub makes them; a repeated heading gets a number."""
    found: list[str] = []
    for heading in _HEADING.findall(_FENCED.sub("", document.read_text())):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / unquote(path)).resolve() if path else document
        assert target.exists(), f"{link}: there is no such file"
        assert target == REPOSITORY or REPOSITORY in target.parents, f"{link}: outside of the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: there is no such heading among {sorted(anchors(target))}"


def test_a_wrong_link_would_be_found() -> None:
    assert {"docs/getting-started.md", "docs/recipes.md"} <= set(links(REPOSITORY / "README.md"))
    assert "the-usual-mistakes" in anchors(REPOSITORY / "docs" / "getting-started.md")
