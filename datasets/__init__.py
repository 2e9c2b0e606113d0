"""From a list file to a batch: records, order, sampling, crops, plans, readers, workers, loader."""
