"""The training and evaluation engine: above `datasets` and `methods`, below `main.py` and `anal_tools`."""
