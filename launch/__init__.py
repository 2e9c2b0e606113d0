"""Start runs: the layer between `train.sh` and `main.py`. Imports no torch and no code that reads videos."""
