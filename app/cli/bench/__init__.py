"""Measuring: this machine, its roofs, an engine under them, and the service around the engine."""
