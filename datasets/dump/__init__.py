"""`python main.py dump`: write videos as JPEG folders, packs or clips that are cheap to sample."""
