"""Fusion of user and target (Figure 2 of the HLLM paper): where the candidate of an exposure meets the user."""

from enum import StrEnum


class Fusion(StrEnum):
    """One of three; its value is the name in configurations."""

    NONE = "none"
    """Nowhere: no query and no head, the model is generative only (Eq. 1)."""
    EARLY = "early"
    """In the user encoder: the query is the target item, and its output is scored."""
    LATE = "late"
    """In the head: the query is the learned [USER] vector, whose output meets the target's features there."""

    @property
    def has_queries(self) -> bool:
        """Whether exposures are asked for by query tokens, and scored by a head."""
        return self is not Fusion.NONE

    @property
    def query_is_target(self) -> bool:
        """Whether each exposure has a query of its own, the target item."""
        return self is Fusion.EARLY

    @property
    def query_is_user(self) -> bool:
        """Whether exposures of one moment share the [USER] query, and targets have slots of their own."""
        return self is Fusion.LATE
