"""Checkpoints of a run: saving, loading, directory layout, the safe reader, remote copies."""
