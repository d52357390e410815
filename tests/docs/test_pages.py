"""What the pages name is there: files, and pages that are linked to."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/*.md"))
FOLDERS = ("components", "docs", "images", "k8s", "pipelines", "tests", "zhllama")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_are_there(page):
    found = re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./*<>-]*[\w*>/])", page.read_text("utf-8"))
    # `<stage>` stands for any, `NAME` for what somebody calls it; k8s' own page says components/ for k8s/components/
    paths = {re.sub(r"<\w+>|\bNAME\b", "*", path.rstrip("/")) for path in found}
    gone = [path for path in sorted(paths) if not any(any(base.glob(path)) for base in (ROOT, ROOT / "k8s"))]
    # an overlay beside a clone
    assert [path for path in gone if not path.startswith("zhllama/k8s/")] == []


def test_links_lead_to_pages():
    links = {
        (page.name, target)
        for page in PAGES
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text("utf-8"))
        if not (page.parent / target).exists()
    }
    assert links == set()


def test_every_page_is_found_from_the_readme():
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        text = page.read_text("utf-8")
        names = re.findall(r"\bdocs/([\w-]+\.md)", text) + re.findall(r"\]\(([\w-]+\.md)\)", text)
        waiting += [ROOT / "docs" / name for name in names if (ROOT / "docs" / name).exists()]
    assert [page.name for page in PAGES if page not in seen and page.parent.name == "docs"] == []
