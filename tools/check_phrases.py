"""Report phrases that must not come back into the texts, comments and messages of the repository.

    python tools/check_phrases.py [FILE ...]

Without files it reads all tracked ones of these kinds. It prints one line per phrase,
`file:line: phrase -> suggestion`, and exits with status 1 if there are any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
KINDS = ("*.py", "*.js", "*.html", "*.css", "*.md", "*.toml", "*.yaml", "*.yml", "*.tpl", "*.sh")
NAMES = ("Makefile", "Dockerfile", ".ci/run")
EXEMPT = {"tools/check_phrases.py", "tests/unit/test_check_phrases.py"}  # they quote the phrases

_NOUNS = "batch class device epoch file flag idea image line model object pixel pod request setting"
_FINE = "better difference faster fewer larger less longer more reason slower smaller such worse"

SUGGESTIONS = {
    re.compile(pattern, re.IGNORECASE): suggestion
    for pattern, suggestion in {
        rf"(?<!there )\b(is|are) no (?!({_FINE.replace(' ', '|')})\b)\w+": "is not a",
        rf"\b(one|once|lines?|flag|bytes?) an? ({_NOUNS.replace(' ', '|')}|value|window)\b": "per",
        r'("""|/\*\* )(Of|What)\b': "begin with a verb or a noun",
        r"\b(some|no|every|any)body\b|\bwhoever\b": "client, request, caller",
        r"\b(is|are|was|were|be) told\b(?!.apart)": "is reported, is shown",
        r"\b(tells? of|told (of|so|plainly|from))\b": "report, describe",
        r"\b(told|tells?|telling)( \w+)? apart\b": "separated, distinguished",
        r"\b(go|goes|gone|went) on\b|\bgoing on (from|with)\b": "continue, resume",
        r"""(?<!ask )(?<!asks )(?<!wait )(?<!waits )\bfor one(?=[.)"'`])""": "for example",
        r"\bhouse\b": "service, module, memory",
        r"\bgiants?\b": "large image",
        r"\bdeeds?\b": "action",
        r"\bpatience\b": "timeout",
        r"\bat the door\b": "at admission",
        r"\bof ours\b|\bour own\b": "internal",
        r"\bin words\b": "as text",
        r"\bwhat (is there|there is)\b": "name the thing",
        r"\bis there for\b": "is for",
        r"\bthere is nothing\b": "not found, empty",
        r"\bstands? (in|behind|in front of) (?!for\b)": "is in, follows, precedes",
        r"\bto be had\b": "available, supported",
        r"\bturn(s|ed)? (down|away)\b": "reject",
        r"\btake in\b|\btaken in(?! JSON)\b": "load, accept",
        r", and else\b": "otherwise",
    }.items()
}


def find_phrases(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, phrase and suggestion for each phrase in a text."""
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, suggestion in SUGGESTIONS.items():
            for found in pattern.finditer(line):
                yield number, found[0].strip(), suggestion


def list_tracked_files() -> list[Path]:
    """List the files under version control that the check reads."""
    command = ["git", "ls-files", "-z", *KINDS, *NAMES]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and name not in EXEMPT]


def main(arguments: list[str]) -> int:
    """Print the phrases in the given files, or in all tracked ones; return the exit status."""
    count = 0
    for path in [Path(name).absolute() for name in arguments] or list_tracked_files():
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        for line, phrase, suggestion in find_phrases(path.read_text(encoding="utf-8")):
            print(f"{name}:{line}: {phrase} -> {suggestion}")
            count += 1
    if count:
        print(f"{count} phrases to rewrite", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
