"""Histories of users for a service: the dataset's events, then those that the service was given.

An event that is in both the log and the dataset (same item and second) counts once, so a dataset that grows by the
log's events changes no history. Events are sorted by time; those of one second keep the order of their arrival.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from hllm_torchrec.data.event_log import EventLog, LoggedEvent
from hllm_torchrec.data.events import Events
from hllm_torchrec.inference.raw_ids import RawIds
from hllm_torchrec.serving.scorer import Scorer
from hllm_torchrec.serving.user_state import UserHistory


@dataclass(frozen=True)
class KnownHistory:
    """All known events of a user.

    number: row number in the log of the last event that was read, 0 if none was; logged: how many of the user's rows
    the log had up to there, which shows whether some were deleted since.
    """

    events: UserHistory
    number: int = 0
    logged: int = 0


class ServiceHistories:
    """Histories by raw user id. log: None for a service that takes no events."""

    def __init__(self, scorer: Scorer, log: EventLog | None) -> None:
        self._scorer, self._log, self._dataset = scorer, log, scorer.experiment.dataset
        self._users = RawIds(self._dataset.users["raw_user_id"], "user")
        self.actions = {name: int(number) for number, name in self._dataset.manifest["actions"]["names"].items()}

    def dense_user(self, user: str | None) -> int:
        """Dense id of a raw one; 0 for a user whom the dataset does not have, or who was forgotten."""
        if user is None or (self._log is not None and self._log.is_forgotten(user)):
            return 0
        return max(0, int(self._users.find([user])[0]))

    def read(self, user: str) -> KnownHistory:
        """The complete history of a user."""
        dense = self.dense_user(user)
        events = self._dataset.user_events(dense) if dense else Events.at([])
        return self.newer(KnownHistory(UserHistory(dense, **events.columns)), user)

    def newer(self, known: KnownHistory, user: str) -> KnownHistory:
        """The history with what the log has gained since; it is read anew if the log has also lost some of it."""
        if self._log is None:
            return known
        is_gone = known.events.user_id != 0 and self._log.is_forgotten(user)
        if is_gone or self._log.count(user, known.number) != known.logged:
            return self.read(user)
        logged, number = self._log.of_user(user, known.number)
        count = known.logged + len(logged)
        kept = _without(logged, known.events, self._scorer)
        if known.number and len(kept) < len(logged):  # of the dataset, or of the log, where it counts twice
            return self.read(user)
        logged = kept
        if not logged:
            return KnownHistory(known.events, number, count)
        joined = Events.concat([known.events, self._encoded(logged)])
        order = np.argsort(joined.timestamps, kind="stable")
        return KnownHistory(UserHistory(known.events.user_id, **joined[order].columns), number, count)

    def _encoded(self, logged: list[LoggedEvent]) -> Events:
        """Events by dense ids; what is no longer known is the unknown item or action."""
        return Events.at(
            [event.timestamp for event in logged],
            item_ids=_known_items(self._scorer, logged),
            labels=[np.nan if event.label is None else event.label for event in logged],
            actions=[0 if event.action is None else self.actions.get(event.action, 0) for event in logged],
        )


def _without(logged: list[LoggedEvent], events: UserHistory, scorer: Scorer) -> list[LoggedEvent]:
    """The logged events that are not among `events`."""
    if not logged or not len(events):
        return logged
    had = Counter(zip(events.item_ids.tolist(), events.timestamps.tolist(), strict=True))
    kept = []
    for event, item in zip(logged, _known_items(scorer, logged), strict=True):
        if had[item, event.timestamp] > 0:
            had[item, event.timestamp] -= 1
        else:
            kept.append(event)
    return kept


def _known_items(scorer: Scorer, logged: list[LoggedEvent]) -> list[int]:
    """Dense ids, 0 for those that are not known."""
    found = scorer.new_items.find([event.item for event in logged])
    return [int(item) if 0 <= item < scorer.num_items else 0 for item in found]
