"""Losses: InfoNCE, sampled binary cross-entropy, classification."""
