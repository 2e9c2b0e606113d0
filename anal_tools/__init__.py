"""Offline analysis: what main.py wrote, read back and explained. Runs on a CPU."""
