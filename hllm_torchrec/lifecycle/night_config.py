"""Configuration of `hllm nightly`: one YAML file that is the same for all nights."""

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
"""Placeholder for the night's name in `append.path` and `append.items`."""

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
    """The new data of a night, which is read as by `hllm prepare --append`."""

    source: str = "table"
    """Value of --source of `hllm prepare`."""
    path: str = "exports/{night}.yaml"
    """Value of --path of `hllm prepare`; {night} is replaced by the night's name."""
    items: str | None = None
    """Value of --items of `hllm prepare`, if the source has this option; {night} is replaced by the night's name."""


@dataclass(frozen=True)
class GateConfig:
    """Condition under which a night's model is published."""

    max_drop: float = 0.002
    """Maximum drop of the AUC below that of the published model, on the same new exposures."""
    on_unsure: Literal["pass", "fail"] = "pass"
    """Result of the gate if the drop is larger but may be due to chance (its interval contains 0)."""
    least_auc: float = 0.0
    """Minimum AUC of a model that is published, including the first model."""
    draws: int = 0
    """Number of resamples for bootstrap intervals over users in the night's metrics.json; 0: none. The gate does not
    need them.
    """


@dataclass(frozen=True)
class StoresConfig:
    """Stores of embeddings that are published with the run."""

    items: bool = True
    """Item store, if the model has an Item LLM. While the Item LLM's weights do not change, only new and changed items
    are encoded."""
    users: bool = True
    """User store; a new one is made for every new model."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Data type of new stores."""


@dataclass(frozen=True)
class NightConfig:
    """One night: append, train, evaluate, gate, embed, publish.

    Raises:
        ConfigError: values are out of range, or `increment` has fields that `hllm nightly` sets; lists all problems.
    """

    folder: str = "nights"
    """Folder for states, runs, stores, releases and the aliases `current` and `previous`."""
    dataset: str = "data/shop"
    """Dataset to which each night appends; made once by `hllm prepare`."""
    append: AppendConfig = field(default_factory=AppendConfig)
    """The new data of a night."""
    training: str = "configs/quickstart.yaml"
    """Configuration of `hllm train`, for the first model and, with the changes in `increment`, for every later one."""
    increment: dict[str, Any] = field(default_factory=dict)
    """Dotted fields of `training` that differ in incremental training, such as {optim.lr: 5.0e-4}. Without `stages`, a
    night trains one epoch on the new events, with the last stage's `item_embeddings`."""
    start_from: str | None = None
    """Run from which the first night starts; None: the first night trains a new model on all events."""
    held_out: float = 0.2
    """Share of a night's new events, the last ones by time, that its model is not trained on; the next night trains on
    them. The first half of these events selects the checkpoint (valid), the second half decides the gate (test)."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Condition for publishing."""
    stores: StoresConfig = field(default_factory=StoresConfig)
    """Stores that are published with the run."""
    timeout: float = 3600.0
    """Seconds that the other ranks wait for rank 0 to append or publish."""
    keep: int = 7
    """Number of newest nights whose runs and stores are kept, besides those of the aliases and of unfinished nights."""

    def __post_init__(self) -> None:
        problems = list(out_of_bounds(self, NIGHT_BOUNDS))
        reserved = [key for key in self.increment if key in RESERVED]
        problems += [f"increment: {key}: is set by `hllm nightly`; leave it out" for key in reserved]
        if problems:
            raise ConfigError(problems)

    def train_config(self, options: dict[str, Any], *, increment: bool) -> Config:
        """The configuration of a night's training: incremental, or of the first model.

        Raises:
            ConfigError: `training` or `increment` is not valid for `hllm train`, uses item embeddings from a store, or
                trains on valid.
        """
        given = dict(options)
        if increment:
            given = {"stages": [self._increment_stage()], **self.increment, **options}
        words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]
        config = load_config(["--config", self.training, *words])
        if takes_stored_items(config):
            raise ConfigError(
                f"{self.training}: item_embeddings: stored: no store contains a night's new items before the night has "
                "trained; write cached"
            )
        if config.data.train_part != "train":
            raise ConfigError(
                f"{self.training}: data.train_part: {config.data.train_part}: a night selects its checkpoint on valid, "
                "and the next night trains on valid; write train"
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
"""Fields of the configuration of `hllm train` that a night sets."""


def check_night(name: str) -> str:
    """Return a night's name. Raises ValueError if it is not a plain file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"--night {name!r}: must consist of letters, digits, dots, dashes and underscores and start with a letter "
            "or digit, such as 2023-11-22"
        )
    return name
