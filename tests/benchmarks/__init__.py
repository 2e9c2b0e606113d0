"""Benchmarks by topic; each prints one JSON line per figure. None of them runs in `make test`."""
