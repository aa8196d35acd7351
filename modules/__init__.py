"""Building blocks of the models: pure tensor code without process groups, ranks or environment variables."""

if __name__ == "modules":
    raise ImportError("modules is hllm_torchrec.modules: write 'from hllm_torchrec.modules import ...'")
