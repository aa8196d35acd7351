"""One YAML file per experiment; see the README for how they are named and overridden."""

if __name__ == "configs":
    raise ImportError("configs is hllm_torchrec.configs: write 'from hllm_torchrec.configs import ...'")
