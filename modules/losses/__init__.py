"""Losses: InfoNCE, sampled binary cross-entropy, losses of tasks, cross-entropy of tokens."""
