"""Embedding jobs, vectors of exposures, item index, quantized tables."""
