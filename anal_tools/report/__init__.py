"""`python main.py report EXP [EXP2 ...]`: what a model gets wrong, as a folder of pages that opens anywhere."""
