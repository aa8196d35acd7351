"""Softmax attention over packed sequences: histories with query tokens, and item texts."""
