"""`python main.py lists`: write list files from the official annotation files of a data set."""
