"""Histories of users for a service: events of the dataset, and events of the service's log.

An event that is in both the log and the dataset (same item and second) counts once. So histories do not change when the
log's events are appended to the dataset. Events are sorted by time; those of the same second stay in order of arrival.
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

    number: row number of the last event that was read from the log, 0 if none was; logged: number of the user's rows
    up to that row when they were read. If the log has fewer of them now, rows were deleted.
    """

    events: UserHistory
    number: int = 0
    logged: int = 0


class ServiceHistories:
    """Histories of users by raw user id. log: None for a service that accepts no events."""

    def __init__(self, scorer: Scorer, log: EventLog | None) -> None:
        self._scorer, self._log, self._dataset = scorer, log, scorer.experiment.dataset
        self._users = RawIds(self._dataset.users["raw_user_id"])
        self.actions = {name: int(number) for number, name in self._dataset.manifest["actions"]["names"].items()}

    def dataset_has(self, user: str) -> bool:
        """True if the loaded version of the dataset has the user, also if the user was forgotten here."""
        return bool(self._users.find([user])[0] > 0)

    def dense_user(self, user: str | None) -> int:
        """Dense id of a raw user id; 0 if the dataset does not have the user, or the user was forgotten."""
        if user is None or (self._log is not None and self._log.is_forgotten(user)):
            return 0
        return max(0, int(self._users.find([user])[0]))

    def read(self, user: str) -> KnownHistory:
        """The complete history of a user."""
        dense = self.dense_user(user)
        events = self._dataset.user_events(dense) if dense else Events.at([])
        return self.newer(KnownHistory(UserHistory(dense, **events.columns)), user)

    def newer(self, known: KnownHistory, user: str) -> KnownHistory:
        """The history with the log's events since `known` was read; read completely again if rows were deleted."""
        if self._log is None:
            return known
        is_gone = known.events.user_id != 0 and self._log.is_forgotten(user)
        if is_gone or self._log.count(user, known.number) != known.logged:
            return self.read(user)
        logged, number = self._log.of_user(user, known.number)
        count = known.logged + len(logged)
        new = _without(logged, known.events, self._scorer)
        # A new event of the log equals an event in `known` (same item and second). If the known event is from the
        # dataset, the two are one event; if it is from the log, they are two. `known` does not record which, so read
        # again, starting from the dataset.
        if known.number and len(new) < len(logged):
            return self.read(user)
        logged = new
        if not logged:
            return KnownHistory(known.events, number, count)
        joined = Events.concat([known.events, self._encoded(logged)])
        order = np.argsort(joined.timestamps, kind="stable")
        return KnownHistory(UserHistory(known.events.user_id, **joined[order].columns), number, count)

    def _encoded(self, logged: list[LoggedEvent]) -> Events:
        """Logged events with dense ids; items and actions that are no longer known become the unknown one (0)."""
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
    remaining = Counter(zip(events.item_ids.tolist(), events.timestamps.tolist(), strict=True))
    new = []
    for event, item in zip(logged, _known_items(scorer, logged), strict=True):
        if remaining[item, event.timestamp] > 0:
            remaining[item, event.timestamp] -= 1
        else:
            new.append(event)
    return new


def _known_items(scorer: Scorer, logged: list[LoggedEvent]) -> list[int]:
    """Dense item ids of logged events; 0 for items that are not known."""
    found = scorer.new_items.find([event.item for event in logged])
    return [int(item) if 0 <= item < scorer.num_items else 0 for item in found]
