"""Training job: `train.py --config configs/quickstart.yaml [--field.name value ...]`, alone or under torchrun."""

import sys

from hllm_torchrec.config.loading import load_config
from hllm_torchrec.launch.entry import run_job
from hllm_torchrec.launch.recipes import with_recipe
from hllm_torchrec.training.wandb_sink import check_logs


def main(argv: list[str] | None = None) -> int:
    """Run one configuration; returns the exit status, see `launch.entry.run_job`."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_job("train", lambda: train(arguments))


def train(arguments: list[str]) -> None:
    """Train the configuration of `arguments`, as a rank of the job described by the environment or as one process.

    Raises:
        ValueError: the configuration, or a file that it names, is invalid; or another process trains into the output.
        ConnectionError: the ranks could not connect.
    """
    config = load_config(with_recipe(arguments))  # report errors before large imports
    check_logs(config.logs)
    from hllm_torchrec.checkpoint.remote_runs import run_lock
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.training.trainer_setup import build_trainer

    with distributed_device(config.parallel.timeout) as device, run_lock(config.output):
        build_trainer(config, device).run()


if __name__ == "__main__":
    sys.exit(main())
