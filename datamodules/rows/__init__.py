"""The rows of whatever holds them: read by id, checked, collated, compared with those of a checkpoint."""
