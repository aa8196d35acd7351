"""Embedding jobs, vectors of exposures, new items, item index, quantized tables."""
