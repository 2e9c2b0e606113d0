"""`python main.py dump`: videos as JPEG folders, shards, or clips that are cheap to sample."""
