"""The files of the web page, as far as the service depends on them."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from app.api.middleware import PREFIX_SCRIPT_HASH

STATIC = Path(__file__).parents[3] / "app/static"


def test_policy_has_the_hash_of_the_only_inline_script() -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", (STATIC / "index.html").read_text())
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"sha256-{digest}" == PREFIX_SCRIPT_HASH


def test_modules_of_the_page_import_each_other_by_existing_relative_paths() -> None:
    for path in STATIC.glob("*.js"):
        for name in re.findall(
            r'^(?:import|\} from|export .* from).*?"(.+?)"', path.read_text(), re.M
        ):
            assert name.startswith("./"), f"{path.name}: {name}"
            assert (STATIC / name).exists(), f"{path.name}: {name}"
