"""`python main.py dump`: write videos as JPEG folders, shards or clips that are cheap to sample."""
