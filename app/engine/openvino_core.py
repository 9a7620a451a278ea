"""The one OpenVINO runtime of this process."""

from __future__ import annotations

import functools

import openvino as ov


@functools.cache
def shared_core() -> ov.Core:
    """Return the only Core of this process, which is never freed.

    A Core gives the thread that loads its CPU plugin another stack for signal handlers, and unmaps
    that stack when the plugin is freed. If another thread frees the plugin, as it does when a model
    is replaced, the next signal that the first thread handles ends the process with SIGSEGV.
    """
    return ov.Core()
