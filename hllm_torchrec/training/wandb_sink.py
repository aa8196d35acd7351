"""A run's numbers for Weights & Biases, by option: `logs.wandb: PROJECT`. Written to <run>/wandb when offline."""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.run_log import RunLog
from hllm_torchrec.config.loading import to_dict
from hllm_torchrec.config.schema import Config, LogsConfig


class WandbLog:
    """A run of Weights & Biases; a resumed run of ours goes on with it. For one process."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Begin, or go on with, the run that belongs to `run_dir`; `config` is shown beside it."""
        import wandb  # seconds to import, and optional

        name = str(run_dir.resolve())
        self._run: Any = wandb.init(
            project=project,
            dir=str(run_dir),
            name=run_dir.name,
            id=hashlib.blake2b(name.encode(), digest_size=8).hexdigest(),
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Charts go by our own step: a resumed run repeats some, which its own counter would refuse.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand on the numbers of one event."""
        if numbers:
            self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """Write or send what is left."""
        self._run.finish()


def open_run_log(config: Config, output: Path, rank: int, resumed_step: int | None) -> RunLog:
    """The log of a training run in its folder `output`, on every rank; only rank 0's writes.

    Raises:
        ConfigError: `logs.wandb` without the package.
    """
    check_logs(config.logs)
    also = None
    if config.logs.wandb is not None and rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        also = WandbLog(config.logs.wandb, output, to_dict(config))
    return RunLog(output, rank, resumed_step, also)


def check_logs(logs: LogsConfig) -> None:
    """Whether what is asked for can be had.

    Raises:
        ConfigError: the package is not installed.
    """
    if logs.wandb is not None and importlib.util.find_spec("wandb") is None:
        remedy = "pip install 'hllm_torchrec[wandb]', or leave the field out"
        raise ConfigError(f"logs.wandb: {logs.wandb!r}: needs the package wandb: {remedy}")
