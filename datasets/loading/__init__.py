"""From plans to batches: the reader processes and the loaders."""
