"""`python main.py scan`: examine every file of a list before training reads it."""
