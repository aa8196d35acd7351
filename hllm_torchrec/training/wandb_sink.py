"""Weights & Biases sink, enabled by `logs.wandb: PROJECT`. Offline mode writes to <run>/wandb."""

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
    """A run of Weights & Biases; a resumed training run continues it. Create it on one rank only."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Start or resume the W&B run of `run_dir`, with `config` attached."""
        import wandb  # optional, and takes seconds to import

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
        # Use the training step as the x axis: a resumed run repeats steps, which W&B's monotonic counter rejects.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the metrics of one event."""
        if numbers:
            self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """Flush and close."""
        self._run.finish()


def open_run_log(config: Config, output: Path, rank: int, resumed_step: int | None) -> RunLog:
    """Open the log of a training run in its folder `output`, on every rank; only rank 0 writes.

    Raises:
        ConfigError: `logs.wandb` is set and the package is not installed.
    """
    check_logs(config.logs)
    sink = None
    if config.logs.wandb is not None and rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        sink = WandbLog(config.logs.wandb, output, to_dict(config))
    return RunLog(output, rank, resumed_step, sink, bears_full_disk=config.reliability.disk_full == "go_on")


def check_logs(logs: LogsConfig) -> None:
    """Check that the packages of the configured sinks are installed.

    Raises:
        ConfigError: the package is not installed.
    """
    if logs.wandb is not None and importlib.util.find_spec("wandb") is None:
        remedy = "pip install 'hllm_torchrec[wandb]', or remove the field"
        raise ConfigError(f"logs.wandb: {logs.wandb!r}: needs the package wandb: {remedy}")
