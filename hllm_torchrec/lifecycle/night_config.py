"""Configuration of `hllm nightly`: one YAML, independent of the night."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.bounds import out_of_bounds
from hllm_torchrec.config.loading import load_config
from hllm_torchrec.config.rules import takes_stored_items
from hllm_torchrec.config.schema import Config

PLACE = "{night}"
"""Stands for the night's name in `append.path` and `append.items`."""

NIGHT_BOUNDS = {
    "held_out": "> 0, < 1",
    "gate.max_drop": ">= 0",
    "gate.draws": ">= 0",
    "gate.least_auc": ">= 0, < 1",
    "keep": ">= 1",
    "timeout": "> 0",
}


@dataclass(frozen=True)
class AppendConfig:
    """The new data of a night, as `hllm prepare --append` reads it."""

    source: str = "table"
    """Source of `hllm prepare`."""
    path: str = "exports/{night}.yaml"
    """Its --path; {night} stands for the night's name."""
    items: str | None = None
    """Its --items, if the source has one; {night} as above."""


@dataclass(frozen=True)
class GateConfig:
    """Condition under which a night's model is published."""

    max_drop: float = 0.002
    """Largest drop of AUC below the published model's, on the same new exposures."""
    on_unsure: Literal["pass", "fail"] = "pass"
    """If the drop is larger, but chance may explain it."""
    least_auc: float = 0.0
    """Smallest AUC of a model that is published, also of the first one."""
    draws: int = 0
    """Resamples for intervals over users in the night's metrics.json; 0: none, the gate has its own interval."""


@dataclass(frozen=True)
class StoresConfig:
    """Stores of embeddings that are published with the run."""

    items: bool = True
    """Item store, if the model has an Item LLM; only new and changed items are encoded while its weights stay."""
    users: bool = True
    """User store; made anew for every new model."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Data type of new stores."""


@dataclass(frozen=True)
class NightConfig:
    """One night: append, train, evaluate, gate, embed, publish.

    Raises:
        ConfigError: values out of range, or entries of `increment` that `hllm nightly` sets itself; names all of them.
    """

    folder: str = "nights"
    """Where states, runs, stores, releases and the aliases `current` and `previous` are written."""
    dataset: str = "data/shop"
    """Dataset that grows, made once by `hllm prepare`."""
    append: AppendConfig = field(default_factory=AppendConfig)
    """The new data of a night."""
    training: str = "configs/quickstart.yaml"
    """Configuration of `hllm train`, for the first model and, with `increment`, for every night's."""
    increment: dict[str, Any] = field(default_factory=dict)
    """Dotted fields of that configuration that differ in a night's increment, such as {optim.lr: 5.0e-4}. Without
    `stages` an increment is one epoch over what is new, with the last stage's `item_embeddings`."""
    start_from: str | None = None
    """Run from which the first night starts; none given: the first night trains on all events from the beginning."""
    held_out: float = 0.2
    """Share of a night's new events, the last by time, that its model is evaluated on; the next night trains on them.
    The first half of them selects checkpoints (valid), the second half decides the gate (test)."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Condition of publishing."""
    stores: StoresConfig = field(default_factory=StoresConfig)
    """Stores that are published with the run."""
    timeout: float = 3600.0
    """Seconds that ranks wait for one that appends or publishes."""
    keep: int = 7
    """Nights whose runs and stores are kept, besides those that an alias names."""

    def __post_init__(self) -> None:
        problems = list(out_of_bounds(self, NIGHT_BOUNDS))
        reserved = [key for key in self.increment if key in RESERVED]
        problems += [f"increment: {key}: is set by `hllm nightly`; leave it out" for key in reserved]
        if problems:
            raise ConfigError(problems)

    def train_config(self, options: dict[str, Any], *, increment: bool) -> Config:
        """The configuration of a night's training: of an increment, or of the first model.

        Raises:
            ConfigError: `training` or `increment` are not of `hllm train`, take item embeddings from a store, or train
                on valid.
        """
        given = dict(options)
        if increment:
            given = {"stages": [self._increment_stage()], **self.increment, **options}
        words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]
        config = load_config(["--config", self.training, *words])
        if takes_stored_items(config):
            raise ConfigError(
                f"{self.training}: item_embeddings: stored: a night's new items are in no store before it has trained; "
                "write cached"
            )
        if config.data.train_part != "train":
            raise ConfigError(
                f"{self.training}: data.train_part: {config.data.train_part}: a night selects its checkpoint on valid, "
                "and the next one trains on it; write train"
            )
        return config

    def _increment_stage(self) -> dict[str, Any]:
        last = load_config(["--config", self.training]).stages[-1]
        return {"name": "increment", "epochs": 1, "item_embeddings": last.item_embeddings}


RESERVED = (
    "output",
    "resume",
    "start_from",
    "data.dataset",
    "data.version",
    "data.train_since",
    "data.train_late_after",
)
"""Fields of `hllm train` that a night sets."""


def check_night(name: str) -> str:
    """Return a night's name. Raises ValueError if it is not a plain name of a file."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"--night {name!r}: must be letters, digits, dots and dashes, such as 2023-11-22")
    return name
