"""`python main.py scan`: look at every file of a list before training does."""
