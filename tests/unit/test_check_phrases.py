"""tools/check_phrases.py: which phrases it reports, and how."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools.check_phrases import SUGGESTIONS, find_phrases, list_tracked_files

REPORTED = {
    "it raises where the loss is no number": "is no number",
    "its bytes are no UTF-8": "are no UTF",
    "an engine for each, one a device": "one a device",
    "a flag a setting": "flag a setting",
    "23 bytes a pixel": "bytes a pixel",
    '    """Of the last batch, in seconds."""': '"""Of',
    "/** What the headers say. */": "/** What",
    "requests of somebody else": "somebody",
    "the client is told which are allowed": "is told",
    "/models tells of it": "tells of",
    "where objects are told apart": "told apart",
    "which tells them apart": "tells them apart",
    "a run that was gone on with": "gone on",
    "it goes on where it was": "goes on",
    "a starting point for going on from it": "going on from",
    "(a progress bar for one)": "for one",
    "what is in the house at once": "house",
    "a giant takes a quarter": "giant",
    "the last deed": "deed",
    "an end to its patience": "patience",
    "they wait at the door": "at the door",
    "an error of ours": "of ours",
    "in our own terms": "our own",
    "why, in words": "in words",
    "write what there is": "what there is",
    "what each probe is there for": "is there for",
    "there is nothing at /x": "there is nothing",
    "the figure stands in the card": "stands in",
    "bf16 is not to be had here": "to be had",
    "requests are turned away": "turned away",
    "model x is not taken in": "taken in",
    "CPUs, and else none": ", and else",
}

ACCEPTED = [
    "There is no lock, and there are no retries.",
    "It is no longer served, and is no faster than before.",
    "The one a client sent is the one an engine computes.",
    "It handles 60 images a second.",
    "The answer for one image; a client asks for one.",
    "Requests never wait for one.",
    "The mask is taken into account.",
    "What happens next is in the log.",
    "It is told-apart_from_identifiers: in_words(text), warehouse",
    "nginx stands in for the proxy",
]


@pytest.mark.parametrize(("line", "phrase"), REPORTED.items())
def test_phrase_is_reported_with_its_line(line: str, phrase: str) -> None:
    found = list(find_phrases(f"a first line\n{line}\n"))
    assert [(number, text) for number, text, _ in found] == [(2, phrase)]


@pytest.mark.parametrize("line", ACCEPTED)
def test_plain_sentence_is_accepted(line: str) -> None:
    assert list(find_phrases(line)) == []


def test_every_pattern_has_an_example() -> None:
    unused = [
        pattern.pattern
        for pattern in SUGGESTIONS
        if not any(pattern.search(line) for line in REPORTED)
    ]
    assert unused == []


def run_check(*files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools/check_phrases.py", *files], capture_output=True, text=True
    )


def test_exit_status_is_1_for_files_with_phrases(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("Plain.\nThis one is no number, says nobody.\n")
    run = run_check(file)
    assert run.returncode == 1
    assert run.stdout.splitlines() == [
        f"{file}:2: is no number -> is not a",
        f"{file}:2: nobody -> client, request, caller",
    ]


def test_exit_status_is_0_for_files_without_phrases(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("The value is not a number.\n")
    assert (run_check(file).returncode, run_check(file).stdout) == (0, "")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_all_kinds_of_tracked_files_are_read() -> None:
    names = {str(path.relative_to(ROOT)) for path in list_tracked_files()}
    assert {
        "README.md", "Makefile", "Dockerfile", ".ci/run", "pyproject.toml", "docker-compose.yml",
        "tests/conftest.py", "app/static/index.html", "app/static/app.js",
        "deploy/kubernetes/cpu/unet-server.yaml", "tools/kube/build_api_server.sh",
        "deploy/helm/unet-server/templates/_pod.tpl",
    } <= names  # fmt: skip
    assert "tools/check_phrases.py" not in names
    assert not any(name.endswith((".png", ".safetensors")) for name in names)
