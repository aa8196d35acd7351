"""Building blocks of the models: pure tensor code that knows nothing of ranks, processes or machines."""

if __name__ == "modules":
    raise ImportError("modules is hllm_torchrec.modules: write 'from hllm_torchrec.modules import ...'")
