"""A run on disk: its options, its folder, and what is read from it."""

from pyro_lottery.runs.loaded import Run, load_run

__all__ = ["Run", "load_run"]
