"""Baselines that a hybrid recommender has to beat, on the same exposures."""
