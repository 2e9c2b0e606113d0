"""Turn a list file into batches: records, order, sampling, crops, plans, readers, workers, loaders."""
