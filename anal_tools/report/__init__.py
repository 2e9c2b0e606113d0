"""`python main.py report EXP [EXP2 ...]`: show the mistakes of a model, as a folder of pages that opens anywhere."""
