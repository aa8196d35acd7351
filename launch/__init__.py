"""Entry points of jobs and of the console command, and TorchX components."""

if __name__ == "launch":
    raise ImportError("launch is hllm_torchrec.launch: write 'from hllm_torchrec.launch import ...'")
