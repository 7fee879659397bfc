"""The pages: every path, link and module that they name is there, and the README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", ".github/CONTRIBUTING.md", "data/README.md", "outputs/README.md", *PAGES]
TEXTS = (".cfg", ".css", ".j2", ".md", ".py", ".sh", ".toml", ".yaml", ".yml")
TRACKED = ("pipeline", "stages", "tests", "docs", ".github", "README.md")
LINK = re.compile(r"\]\(([^()\s]+)\)")
FILE = re.compile(
    r"(?<![\w/.])(?:pipeline|stages|tests|docs|\.github|\.ci)/[\w./-]*\w\.(?:py|sh|yaml|yml|md|png|j2)\b"
)
FOLDER = re.compile(r"`((?:pipeline|stages|tests|docs|\.github)/(?:[\w-]+/)*)`")
MODULE = re.compile(r"-m (pipeline(?:\.\w+)+)")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    here = ROOT / page
    for link in LINK.findall(here.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = here.parent / name if name else here
        assert target.exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link} is no heading there"


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_and_modules_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    modules = [f"{name.replace('.', '/')}.py" for name in MODULE.findall(text)]
    named = {*FILE.findall(text), *FOLDER.findall(text), *modules}
    assert not [name for name in named if not (ROOT / name).exists()]


def test_readme_is_short_and_maps_every_subpackage():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    rows = re.findall(r"^\| `(\w+)` \|", text[text.index("| subpackage |") :], re.MULTILINE)
    there = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    there |= {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"}
    assert sorted(rows) == sorted(there)


def test_every_stage_is_in_the_table_of_stages():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [
        path.stem for path in (ROOT / "stages").glob("*.py") if f"`{path.stem}`" not in text
    ]


def test_nothing_refers_to_a_page_that_readers_do_not_have():
    private = re.compile("SPEC" + r"( section|\.md)")
    paths = [path for name in TRACKED for path in [ROOT / name, *(ROOT / name).rglob("*")]]
    texts = [path for path in paths if path.is_file() and path.suffix in TEXTS]
    assert not [path for path in texts if private.search(path.read_text(encoding="utf-8"))]
