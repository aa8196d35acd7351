"""Embeddings on disk: id -> vector, memory-mapped, updated by atomic commits. See `store.EmbeddingStore`."""

from hllm_torchrec.store.store import EmbeddingStore, Snapshot

__all__ = ["EmbeddingStore", "Snapshot"]
