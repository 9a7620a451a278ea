"""Links, paths, settings and decision records in the Markdown files are correct."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.settings import PREFIX, Settings
from tests.conftest import ROOT

FOLDERS = ("benchmarks", "clients", "deploy", "docs", "tests", "weights")
PAGES = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md")))
)
RECORDS = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
NAMED_PATH = re.compile(
    r"(?<![\w./<:$-])(?:app|benchmarks|clients|deploy|docs|model|requirements|tests|weights)"
    r"/[\w./-]*"
)
WRITTEN_BY_EXAMPLES = {"weights/theirs.safetensors"}

SETTING_ROW = re.compile(rf"^\| `{PREFIX}([A-Z_]+)` \| `([^`]*)` \| \S.* \|$", re.MULTILINE)
STATUS = (
    r"(accepted|superseded(?: in part)? by \[(\d{4})\]\((\d{4})-[\w-]+\.md\))"
    r"(?: \(.+\)|\. .+)?"
)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_broken(page: Path, link: str) -> bool:
    target, _, anchor = link.partition("#")
    path = (ROOT / page).parent / target if target else ROOT / page
    return not path.exists() or (anchor != "" and anchor not in anchors(path))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_exist(page: Path) -> None:
    links = LINK.findall(FENCED.sub("", (ROOT / page).read_text()))
    relative = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in relative if is_broken(page, link)] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_named_paths_exist(page: Path) -> None:
    names = {name.rstrip(".") for name in NAMED_PATH.findall((ROOT / page).read_text())}
    missing = {name for name in names - WRITTEN_BY_EXAMPLES if not (ROOT / name).exists()}
    assert missing == set()


def test_settings_page_lists_every_setting_with_its_default() -> None:
    rows = SETTING_ROW.findall((ROOT / "docs/settings.md").read_text())
    documented = {name.lower(): default for name, default in rows}
    assert len(documented) == len(rows)
    words = {"None": "auto", "False": "off", "True": "on", "()": "none"}
    expected = {
        name: "none"
        if field.annotation == Path | None
        else words.get(str(field.default), str(field.default))
        for name, field in Settings.model_fields.items()
    }
    assert documented == expected


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_decision_record_has_a_title_and_a_status(record: Path) -> None:
    number = record.name[:4]
    title, empty, status = record.read_text().splitlines()[:3]
    assert title.startswith(f"# {int(number)}. ")
    assert empty == ""
    match = re.fullmatch(rf"Status: {STATUS}", status)
    assert match, status
    if match[2]:
        assert match[2] == match[3] > number


def test_index_of_decisions_repeats_titles_and_statuses() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text()
    rows = re.findall(r"^\| (\d{4}) \| \[(.+?)\]\((.+?)\) \| (.+) \|$", index, re.MULTILINE)
    expected = []
    for record in RECORDS:
        title, _, status = record.read_text().splitlines()[:3]
        number = record.name[:4]
        match = re.fullmatch(rf"Status: {STATUS}", status)
        assert match
        expected.append((number, title.removeprefix(f"# {int(number)}. "), record.name, match[1]))
    assert rows == expected
