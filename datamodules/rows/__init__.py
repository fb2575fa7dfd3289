"""The rows of any dataset: read by id, checked, collated, compared with those of a checkpoint."""
