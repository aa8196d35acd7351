"""Scoring, the offline evaluation job, comparison of models, regression gate, report."""
