"""Fusion of user and target item of an exposure (Figure 2 of the HLLM paper)."""

from enum import StrEnum


class Fusion(StrEnum):
    """Kind of fusion; the value is its name in configurations."""

    NONE = "none"
    """No fusion: no queries and no head; the model is generative only (Eq. 1)."""
    EARLY = "early"
    """Fusion in the user encoder: the query is the target item, and the head scores its output."""
    LATE = "late"
    """Fusion in the head: the query is the learned [USER] vector; the head combines its output with the target's
    features."""

    @property
    def has_queries(self) -> bool:
        """True if exposures have query tokens and are scored by a head."""
        return self is not Fusion.NONE

    @property
    def query_is_target(self) -> bool:
        """True if each exposure has its own query, the target item."""
        return self is Fusion.EARLY

    @property
    def query_is_user(self) -> bool:
        """True if exposures at the same time share one [USER] query, and targets have separate feature slots."""
        return self is Fusion.LATE
