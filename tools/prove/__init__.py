"""Proof that no bytes can hold the service: experiments that try, each with its bounds.

    python -m tools.prove [--long] [EXPERIMENT ...]

`docs/reliability.md` explains what is promised and shows the last run. An experiment is a module
with a function `run(seconds)` that returns rows of the table (`report`). It starts its own service
in its own process (`subject`), except for `mutations`, which drives the image workers directly.
"""
