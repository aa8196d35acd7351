"""Where a run goes on: the checkpoint to continue from, and whether it is of the same schedule."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hllm_torchrec.checkpoint import latest_checkpoint
from hllm_torchrec.checkpoint_files import by_step, rescue
from hllm_torchrec.config import Config
from hllm_torchrec.errors import ConfigError
from hllm_torchrec.ranks import on_rank_zero
from hllm_torchrec.schedule import Leg


def checkpoint_to_resume(config: Config, output: Path | None = None) -> Path | None:
    """The newest whole checkpoint of `config.output`, or None where there is none. Collective.

    output: the folder of this host that has the run's checkpoints, where `config.output` is a URL.

    Raises:
        ConfigError: there is one and the run is not to be resumed: it must not be mixed with a new one; or all that
            there are are damaged, and `reliability.no_checkpoint_left` does not say to begin anew.
    """
    folder = (output or Path(config.output)) / "checkpoints"
    if config.resume:
        on_rank_zero(lambda: rescue(folder))
    written = on_rank_zero(lambda: [path.name for path in by_step(folder)])
    if written and not config.resume:
        problem = f"holds a run, up to {written[-1]}: continue it (resume: true) or choose another folder"
        raise ConfigError([f"output: {config.output}: {problem}"])
    path = latest_checkpoint(folder)
    if written and path is None and config.reliability.no_checkpoint_left == "stop":
        raise ConfigError(
            [
                f"resume: none of the checkpoints in {folder} ({', '.join(written)}) is whole, see the warnings: bring "
                "one back from a copy, or begin anew (reliability.no_checkpoint_left: begin)"
            ]
        )
    return path


def check_schedule(checkpoint: Path, extra: dict[str, Any], legs: Sequence[Leg]) -> None:
    """The epochs begun must have the steps they had, or "step n" would be another place in the data.

    Raises:
        ConfigError: they have not.
    """
    begun = sum(leg.first < extra["step"] for leg in legs)
    mine, saved = [leg.steps for leg in legs[:begun]], extra["leg_steps"][:begun]
    if mine != saved:
        raise ConfigError(
            [
                f"resume: the epochs of {checkpoint} have {saved} steps, those of this run {mine}: keep the dataset, "
                "the stages and batch_users x ranks x optim.accumulate (it ran with data.batch_users "
                f"{extra['config']['data']['batch_users']})"
            ]
        )
