"""Turn plans into batches: the reader processes and the loaders."""
