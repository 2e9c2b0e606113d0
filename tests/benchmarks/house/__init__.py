"""Measure the code itself: does a refactoring keep every number, and is the code easier to read."""
