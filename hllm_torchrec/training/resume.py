"""Resuming a run: selection of the checkpoint, and the check that its schedule is unchanged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hllm_torchrec.checkpoint.layout import checkpoints_by_step, finish_interrupted_renames
from hllm_torchrec.checkpoint.load import latest_checkpoint
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.config.loading import to_dict
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.training.stage_schedule import EpochSegment


def checkpoint_to_resume(config: Config, output: Path | None = None) -> Path | None:
    """Return the newest complete checkpoint of `config.output`, or None if there is none. Collective.

    output: the run's folder on this host; it must be given if `config.output` is a URL.

    Raises:
        ConfigError: there are checkpoints and `resume` is false (two runs must not be mixed); or all of them are
            damaged and `reliability.no_checkpoint_left` is "stop".
    """
    folder = (output or Path(config.output)) / "checkpoints"
    if config.resume:
        run_on_rank_zero(lambda: finish_interrupted_renames(folder))
    written = run_on_rank_zero(lambda: [path.name for path in checkpoints_by_step(folder)])
    if written and not config.resume:
        problem = f"holds a run, up to {written[-1]}: continue it (resume: true) or choose another folder"
        raise ConfigError(f"output: {config.output}: {problem}")
    path = latest_checkpoint(folder)
    if written and path is None and config.reliability.no_checkpoint_left == "stop":
        raise ConfigError(
            [
                f"resume: none of the checkpoints in {folder} ({', '.join(written)}) is complete, see the warnings: "
                "restore one from a copy, or start again from step 0 (reliability.no_checkpoint_left: begin)"
            ]
        )
    return path


def changed_settings(extra: dict[str, Any], config: Config) -> list[str]:
    """Settings that differ from those of the checkpoint, as 'name: before -> now'.

    extra: content of the checkpoint's extra.json. Settings of location and duration, `reliability` and `logs` are left
    out, and so are settings that only one of the two versions has.
    """
    before, now = _flat(extra["config"]), _flat(to_dict(config))
    differs = [name for name in before if name in now and before[name] != now[name] and not _may_differ(name)]
    return [f"{name}: {abbreviate(before[name], 80)} -> {abbreviate(now[name], 80)}" for name in differs]


def _may_differ(name: str) -> bool:
    """True for settings of location, duration, reliability and logs, which a resumed run may change."""
    section = name.partition(".")[0]
    return name in ("output", "resume", "max_steps", "start_from") or section in ("reliability", "logs")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return found


def check_schedule(checkpoint: Path, extra: dict[str, Any], segments: Sequence[EpochSegment]) -> None:
    """Check that the epochs that were started have the same numbers of steps as in the checkpoint's run.

    With other numbers of steps, the checkpoint's step would be at another position in the data.

    Raises:
        ConfigError: the numbers of steps differ.
    """
    begun = sum(segment.first_step < extra["step"] for segment in segments)
    # "leg_steps": the steps of each `EpochSegment`, under the key of version 0.1.
    mine, saved = [segment.steps for segment in segments[:begun]], extra["leg_steps"][:begun]
    if mine != saved:
        raise ConfigError(
            [
                f"resume: the epochs of {checkpoint} have {saved} steps, those of this run {mine}: keep the dataset, "
                "the stages and batch_users x ranks x optim.accumulate (the checkpoint's run had data.batch_users "
                f"{extra['config']['data']['batch_users']})"
            ]
        )
