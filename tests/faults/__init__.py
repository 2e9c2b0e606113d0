"""Faults put into running commands, and the warm process that the commands are forked from."""
