"""Requests that schemathesis makes from `/openapi.json`: no server error, nothing undocumented.

They run twice: with any model name, which is rarely one that exists, and with that of a model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tools.prove.report import Row, at_least, format_counts, none_of, noted
from tools.prove.subject import ROOT, Subject, serving

SEED = 20260101
MINIMUM = 500
"""Requests in any run."""
_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
_CONFIG = """
hooks = "tools.prove.api_hooks"
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
"""
_NAMED = '[parameters]\n"path.name" = "nuclei"\n"path.version" = "{version}"\n'
_ALLOWED = frozenset({429, 503, 504})
"""Statuses with which a service may answer that has too much to do."""


def run(seconds: float) -> list[Row]:
    """Run both configurations, each for half of the time."""
    cases, problems, stopped = 0, list[str](), list[str]()
    with serving("--request-timeout-s=10") as subject:
        version = _wait_loaded(subject)
        before = Counter(subject.statuses())
        for config in (_CONFIG, _CONFIG + _NAMED.format(version=version)):
            report = _run_schemathesis(subject, config, seconds / 2)
            cases += report["test_cases"]["generated"]
            problems += [
                f"{failure['title']}: {', '.join(failure['operations'][:3])}"
                for failure in report["failures"]
            ]
            problems += [error["title"] for error in report["errors"]]
            stopped += [
                f"{name}: {phase['status']}"
                for name, phase in report["phases"].items()
                if phase["status"] == "error"
            ]
        statuses = Counter(subject.statuses()) - before
        leftovers = subject.leftovers()
        tracebacks = [line for line in subject.log().splitlines() if "Traceback" in line]
    server_errors = {s: n for s, n in statuses.items() if s >= "500" and int(s) not in _ALLOWED}
    return [
        at_least("requests made from the schema", cases, MINIMUM),
        noted("statuses", format_counts(statuses)),
        none_of("answers that contradict the schema, and server errors", problems),
        none_of("phases that ended with an error", stopped),
        none_of("statuses from 500 on besides 503 and 504", server_errors),
        none_of("left behind", leftovers),
        none_of("tracebacks in the log", tracebacks),
    ]


def _wait_loaded(subject: Subject) -> str:
    """Wait until every model is served, and return the version of the default one."""
    while True:
        listing = json.loads(subject.get("/models").body)
        if all(model["ready"] for model in listing["models"]):
            break
        time.sleep(0.1)
    described = json.loads(subject.get("/v2/models/nuclei").body)
    return str(described["versions"][0])


def _run_schemathesis(subject: Subject, config: str, seconds: float) -> dict[str, Any]:
    """Run the command line, whose report is a stable interface, and return that report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.toml").write_text(config)
        command = [
            sys.executable, "-m", "schemathesis.cli", f"--config-file={folder / 'config.toml'}",
            "run", f"http://127.0.0.1:{subject.port}/openapi.json", f"--checks={','.join(_CHECKS)}",
            f"--seed={SEED}", f"--max-time={max(1, round(seconds))}", "--continue-on-failure",
            "--generation-database=none", "--report=json", "--no-color",
            f"--report-json-path={folder / 'report.json'}",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for the hooks
        result = subprocess.run(  # it writes a cache to the current folder
            command, cwd=folder, env=environment, capture_output=True, text=True
        )
        if not (folder / "report.json").exists():
            raise RuntimeError(f"schemathesis failed:\n{(result.stdout + result.stderr)[-3000:]}")
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        if report["failures"]:
            print(result.stdout, file=sys.stderr)  # says how to reproduce them
        return report
