"""The part of a configuration that says who is told of a run besides `log.jsonl` and TensorBoard."""

import importlib.util
from dataclasses import dataclass

from hllm_torchrec.errors import ConfigError


@dataclass(frozen=True)
class LogsConfig:
    """Who is told of a run besides its directory."""

    wandb: str | None = None
    """Project of Weights & Biases that the run's numbers go to as well (package wandb). Its own variables say how:
    WANDB_MODE=offline writes them into the run's directory, for `wandb sync` later."""


def check_logs(logs: LogsConfig) -> None:
    """Whether what is asked for can be had.

    Raises:
        ConfigError: the package is not installed.
    """
    if logs.wandb is not None and importlib.util.find_spec("wandb") is None:
        remedy = "pip install 'hllm_torchrec[wandb]', or leave the field out"
        raise ConfigError([f"logs.wandb: {logs.wandb!r}: needs the package wandb: {remedy}"])
