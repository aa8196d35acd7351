"""Metrics: AUC and its intervals, metrics of probabilities and of predicted numbers, and retrieval metrics."""
