"""Errors, files, URLs, logs: what every package uses and what knows nothing of recommenders."""
