"""Estimates of memory, traffic and step time on given hardware, without running the model at its size."""
