"""Counts the CPUs that the process may run on. Knows no quota: `app.engine.selection` does."""

from __future__ import annotations

import os


def count_cpus() -> int:
    """Count the CPUs of the process's affinity, or those of the host where there is none."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
