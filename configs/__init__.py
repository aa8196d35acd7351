"""One YAML file per experiment; CONTRIBUTING.md ("A configuration") describes their form."""

if __name__ == "configs":
    raise ImportError("configs is hllm_torchrec.configs: write 'from hllm_torchrec.configs import ...'")
