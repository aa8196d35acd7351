"""Import and export of weights: Hugging Face directories and the published HLLM checkpoints."""
