"""Settings of `hllm downstream`, without what it takes to train: `--help` is then quick."""

from dataclasses import dataclass, field
from pathlib import Path

from hllm_torchrec.baselines.config import DLRM_BOUNDS, DLRMConfig, Way
from hllm_torchrec.config_rules import out_of_bounds
from hllm_torchrec.errors import ConfigError

ALONE, ITEMS, USERS, BOTH = "alone", "items", "users_", "both_"
"""Rows; the last two are followed by a store's name."""


@dataclass(frozen=True)
class DownstreamConfig:
    """A DLRM and the stores that it may read.

    Raises:
        ConfigError: values out of range or rows without their store, all of them.
    """

    output: str = "runs/stages/3"
    """A folder for each row, with checkpoints and predictions."""
    dataset: str = "data/ml-100k"
    """Directory written by `hllm prepare`."""
    item_store: str | None = None
    """Store of item vectors by raw id, of `hllm embed --items` or `hllm exposures --items`."""
    user_stores: tuple[str, ...] = ()
    """Stores of `hllm exposures --users`; the name of a store's folder names its rows."""
    rows: tuple[str, ...] = ()
    """Which rows; none given: all that the stores allow."""
    way: Way = "slots"
    """How vectors enter the DLRM: as slots of the interaction, or among the dense features."""
    vector_dropout: float = 0.0
    """Of the vectors' entries, in training: a user's vector is nearly the user's name."""
    dlrm: DLRMConfig = field(default_factory=DLRMConfig)
    """The DLRM of every row."""

    def __post_init__(self) -> None:
        problems = list(out_of_bounds(self, DLRM_BOUNDS | {"vector_dropout": ">= 0, < 1"}))
        there = self.possible_rows()
        for row in self.rows:
            if row not in there:
                problems.append(f"rows: {row!r}: not possible with these stores; there are {', '.join(there)}")
        if len({Path(store).name for store in self.user_stores}) < len(self.user_stores):
            problems.append(
                f"user_stores: {list(self.user_stores)}: two folders of one name; rows are named by them: rename one"
            )
        if problems:
            raise ConfigError(problems)

    def possible_rows(self) -> dict[str, tuple[str | None, str | None]]:
        """Row -> its stores (items, users)."""
        found: dict[str, tuple[str | None, str | None]] = {ALONE: (None, None)}
        if self.item_store is not None:
            found[ITEMS] = (self.item_store, None)
        for store in self.user_stores:
            found[f"{USERS}{Path(store).name}"] = (None, store)
            if self.item_store is not None:
                found[f"{BOTH}{Path(store).name}"] = (self.item_store, store)
        return found
