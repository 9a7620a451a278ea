"""The files of the web page, as far as the service depends on them."""

from __future__ import annotations

import re
from pathlib import Path

STATIC = Path(__file__).parents[3] / "app/static"


def test_pages_have_no_inline_scripts_styles_or_handlers() -> None:
    for path in STATIC.glob("*.html"):
        text = path.read_text()
        for attributes, content in re.findall(r"<script(.*?)>(.*?)</script>", text, re.S):
            assert "src=" in attributes, path.name
            assert not content, path.name
        assert not re.search(r"<style|\sstyle=|\son\w+=", text), path.name


def test_modules_of_the_page_import_each_other_by_existing_relative_paths() -> None:
    for path in STATIC.glob("*.js"):
        for name in re.findall(
            r'^(?:import|\} from|export .* from).*?"(.+?)"', path.read_text(), re.M
        ):
            assert name.startswith("./"), f"{path.name}: {name}"
            assert (STATIC / name).exists(), f"{path.name}: {name}"
