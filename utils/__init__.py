"""Provide the code that training and evaluation share: one file per noun, a closed list (docs/decisions.md)."""
