"""Measure what docs/reliability.md promises: one file per claim, each with a function `row()`."""
