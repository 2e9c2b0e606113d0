"""Starting runs: what stands between `train.sh` and `main.py`. Imports no torch and nothing that reads videos."""
