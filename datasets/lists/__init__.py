"""`python main.py lists`: the official annotation files of a data set as list files."""
