"""Exact offline metrics: ranking (AUC and its intervals) and retrieval."""
