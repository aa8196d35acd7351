"""State of a night: the results of its steps, in one file that is replaced after each step.

A step that was killed before its entry was written is run again, so running a step twice must have the same result.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.locks import hold_lock

STEPS = ("append", "train", "evaluate", "gate", "embed", "publish")
NIGHTS = "nights"
NIGHT_LOCK = "night.lock"


@dataclass(frozen=True)
class NightState:
    """State of a night. done: completed step -> its facts (JSON values)."""

    path: Path
    night: str
    done: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, night: str) -> Self:
        """Read a night's state; without a file, no step is done.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / NIGHTS / night / "state.json"
        if not path.is_file():
            return cls(path, night)
        try:
            done = json.loads(path.read_text(encoding="utf-8"))["done"]
            unknown = sorted(set(done) - set(STEPS))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); delete it to repeat the night's steps") from error
        if unknown:
            raise ValueError(f"{path} is damaged (unknown step {unknown[0]!r}); delete it to repeat the night's steps")
        return cls(path, night, done)

    def with_step(self, step: str, facts: Mapping[str, Any]) -> "NightState":
        """Record that a step is done; returns the new state."""
        facts = {**facts, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        after = NightState(self.path, self.night, {**self.done, step: facts})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, json.dumps({"night": self.night, "done": after.done}, indent=1) + "\n")
        return after

    def facts(self, step: str) -> Mapping[str, Any]:
        """The facts of a completed step.

        Raises:
            ValueError: the step is not done yet.
        """
        if step not in self.done:
            raise ValueError(f"night {self.night}: step {step} is not done; run it first (--steps {step})")
        return self.done[step]

    @property
    def is_rejected(self) -> bool:
        """True if the gate has rejected the night's model."""
        return "gate" in self.done and self.done["gate"]["status"] != "pass"

    @property
    def is_finished(self) -> bool:
        """True if the release is published, or the gate has rejected the model."""
        return self.is_rejected or STEPS[-1] in self.done


def unfinished_nights(folder: Path) -> list[str]:
    """Sorted names of the nights that were begun and are not finished."""
    names = sorted(path.parent.name for path in (folder / NIGHTS).glob("*/state.json"))
    return [name for name in names if not NightState.read(folder, name).is_finished]


def hold_nights(folder: Path) -> AbstractContextManager[None]:
    """Context manager that holds the lock of the nights in a folder; one process can hold it at a time.

    Raises:
        Locked: another process runs a night.
    """
    return hold_lock(folder / NIGHT_LOCK, f"{folder}: another process runs a night here")
