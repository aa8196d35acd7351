"""Building blocks of the models: pure tensor code, without torch.distributed, ranks or the environment."""

if __name__ == "modules":
    raise ImportError("modules is hllm_torchrec.modules: write 'from hllm_torchrec.modules import ...'")
