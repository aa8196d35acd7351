"""The HLLM model: assembly from modules, item encoding over ranks, parallelization."""
