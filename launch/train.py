"""Train: `train.py --config configs/quickstart.yaml [--field.name value ...]`, on one process or under torchrun."""

import sys

from hllm_torchrec.config import load_config
from hllm_torchrec.config_logs import check_logs
from hllm_torchrec.launch.command import run_job


def main(argv: list[str] | None = None) -> int:
    """Run one configuration; returns the exit status, see `launch.command.run_job`."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_job("train", lambda: train(arguments))


def train(arguments: list[str]) -> None:
    """Train as `arguments` say, as a rank of the job that the environment names, or alone.

    Raises:
        ValueError: the configuration, or what it names, is wrong.
        ConnectionError: the ranks did not come together.
    """
    config = load_config(arguments)  # so that a mistake shows before anything large is imported
    check_logs(config.logs)
    from hllm_torchrec.parallelize import process
    from hllm_torchrec.trainer import Trainer

    with process(config.parallel.timeout) as device:
        Trainer(config, device).run()


if __name__ == "__main__":
    sys.exit(main())
