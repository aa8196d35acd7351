"""Entry points of jobs and of the console command, and TorchX components."""

if __name__ == "launch":
    # ModuleNotFoundError, because TorchX's nightly imports the package of a component file and, only after this
    # error, loads the file by itself.
    raise ModuleNotFoundError(
        "launch is hllm_torchrec.launch: write 'from hllm_torchrec.launch import ...'", name=__name__
    )
