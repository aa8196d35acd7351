"""HLLM-Creator (arXiv 2508.18118): titles of an item for each kind of user, from one user vector."""
