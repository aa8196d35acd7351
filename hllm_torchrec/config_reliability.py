"""The part of a configuration that says what a run does when something goes wrong: see docs/reliability.md."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReliabilityConfig:
    """What a run does when something goes wrong."""

    not_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradients are NaN or infinite: stop, or skip it, that is leave the weights as they are. Its
    batch's ids are written to `bad_batches` in either case."""
    max_skipped: int = 10
    """So many steps may be skipped in a row; the next one stops the run."""
    leakage: Literal["warn", "stop"] = "warn"
    """At a validation AUC above `leakage_above`, where mostly a feature tells the label: warn, or stop after that
    evaluation's checkpoint."""
    leakage_above: float = 0.99
    """AUC that is taken for leakage; `hllm evaluate` warns above the same."""
    asynchronous_checkpoints: bool = False
    """Training waits only until its state is copied to the host's memory (which must have room for a rank's share of
    it); a thread writes it meanwhile."""
    disk_full: Literal["stop", "go_on"] = "stop"
    """A checkpoint that finds no room: stop, or go on without it and try again when the next is due. The last
    one of a run is never done without."""
    no_checkpoint_left: Literal["stop", "begin"] = "stop"
    """A run that resumes and finds damaged checkpoints only: stop and say so, or begin anew beside them."""
