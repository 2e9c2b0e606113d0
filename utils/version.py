"""The version of Zoetrope. This is the one place that has it: pyproject.toml takes it from here."""

VERSION = "0.3.0"
