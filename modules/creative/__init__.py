"""HLLM-Creator (arXiv 2508.18118): a language model that writes a text for an item and a user vector."""
