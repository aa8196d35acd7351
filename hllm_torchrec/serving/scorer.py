"""Scoring of candidates for serving: the history is encoded once and cached, candidates are scored in micro-batches.

    with Scorer.of_run(Path("runs/early")) as scorer:
        user = scorer.read(UserHistory(7, item_ids, timestamps, labels, actions))
        logits = scorer.score(user, candidates, time)          # any number of times for one encoding of the history
        user = scorer.extend(user, UserHistory(7, ...))        # later events; only these are computed

Features come from the collator and the model of training, and the scores equal those of `hllm evaluate` for the same
exposures (up to rounding; see `window_start` for histories longer than `data.max_history`).

Legend: n events, T history events that the model uses, m candidates, D width.
"""

import time as clock
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.errors import configured_by
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.data.numeric_features import numeric_columns
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.evaluation.run_loader import load_run, run_config
from hllm_torchrec.inference.quantization import check_table_type, quantize_items, quantize_tables
from hllm_torchrec.models.assembly import Experiment
from hllm_torchrec.modules.attention.keys_values import HistoryCache, ScoreCandidates
from hllm_torchrec.modules.history_cache import MICRO_BATCH, begin_request, check_encoder, read_history
from hllm_torchrec.modules.lora import merged


@dataclass(frozen=True, init=False)
class UserHistory(Events):
    """Events of one user, oldest first; ids are dense ids of the dataset.

    Raises:
        ValueError: columns of different lengths, or decreasing times.
    """

    user_id: int = field(kw_only=True)

    def __init__(self, user_id: int, *columns: ArrayLike, **named: ArrayLike) -> None:
        """Accept the columns of `Events`: item_ids, timestamps, labels, actions, in this order or by name."""
        super().__init__(**Events(*columns, **named).as_arrays().columns)  # type: ignore[arg-type]  # not yet arrays
        object.__setattr__(self, "user_id", user_id)
        sizes = {name: values.size for name, values in self.columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"user {self.user_id}: columns of different lengths {sizes}: give one entry per event")
        back = np.flatnonzero(np.diff(self.timestamps) < 0)
        if back.size:
            row = int(back[0]) + 1
            raise ValueError(
                f"user {self.user_id}, event {row}: time {self.timestamps[row]} is before that of the previous event "
                f"({self.timestamps[row - 1]}): sort events by time"
            )

    def as_piece(self, first: int = 0) -> Piece:
        """The events as an input of the collator; the exposures are those from index `first` on."""
        return Piece(**self.columns, user_id=self.user_id, first_target=first)

    def since(self, start: int) -> "UserHistory":
        """The events from index `start` on."""
        return UserHistory(self.user_id, **self[start:].columns)

    def followed_by(self, later: "UserHistory") -> "UserHistory":
        """The concatenation of both histories.

        Raises:
            ValueError: events of another user, or before the last event of this history.
        """
        if later.user_id != self.user_id:
            raise ValueError(f"events of user {later.user_id} after those of user {self.user_id}: give one user's")
        return UserHistory(self.user_id, **Events.concat([self, later]).columns)


@dataclass(frozen=True)
class UserState:
    """Encoded history: all events, the index of the first one that the model uses, and the cache from there on."""

    history: UserHistory
    start: int
    cache: HistoryCache


def window_start(events: int, max_history: int) -> int:
    """Index of the first event used of a history of `events` events, such that at most max_history - 1 are used.

    It moves in steps of max_history / 2, so a new event usually extends the cache, and a long history is encoded
    again only every max_history / 2 events. A request sees at least half of max_history events, as in evaluation,
    although evaluation cuts long histories at other indices (relative to the start of the split).
    """
    # Events above the limit, rounded up to a multiple of the step.
    over = events - (max_history - 1)
    step = max(1, max_history // 2)
    return max(0, -(-over // step) * step)


class Scorer:
    """Scores candidates for any user with a trained model, in one process.

    Use `Scorer.of_run`, or pass an experiment whose model has loaded weights.

    Args:
        experiment: see `build_experiment`; its model is put into evaluation mode, and the complete catalogue is
            encoded once by the Item LLM.
        micro_batch: candidates computed at a time; it bounds memory and does not change scores beyond rounding.
        table_dtype: data type of tables and item embeddings, "int8" or "fp16", see `inference.quantization`; the
            model can then not be trained. None: as trained.

    Raises:
        ValueError: a model without a ranking head, more than one process, FSDP, an encoder without a cache, a
            micro-batch below 1, or an unknown type.
    """

    def __init__(self, experiment: Experiment, micro_batch: int = MICRO_BATCH, table_dtype: str | None = None) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch is {micro_batch}: must be at least 1")
        if table_dtype is not None:
            check_table_type(table_dtype)
        if not experiment.batch_spec.fusion.has_queries:
            raise ValueError("objective.fusion: 'none': the model has no head to score candidates; train early or late")
        if dist.get_world_size() > 1 or experiment.config.parallel.dense == "fsdp":
            raise ValueError(
                f"{dist.get_world_size()} processes, parallel.dense {experiment.config.parallel.dense!r}: a scorer "
                "has all weights in one process: build it in one, with parallel.dense ddp"
            )
        self.experiment, self.micro_batch = experiment, micro_batch
        self.hllm = experiment.hllm.eval()
        with configured_by("user.shape", encoder="user.encoder"):
            check_encoder(self.hllm.user)
        if table_dtype is None:
            experiment.use_cached_items()
        else:
            quantize_tables(experiment, table_dtype)
            quantize_items(experiment, table_dtype)
        self._weights = ExitStack()
        # All candidates of a request have the same time, and visibility by second hides events of the same second:
        # so candidates do not see each other.
        spec = replace(experiment.batch_spec, visibility="second")
        self._collator = Collator(experiment.dataset, spec, item_vectors=experiment.item_vectors)

    @classmethod
    def of_run(
        cls,
        run: Path,
        which: str = "best",
        device: torch.device | None = None,
        micro_batch: int = MICRO_BATCH,
        table_dtype: str | None = None,
        *,
        dataset: Path | None = None,
    ) -> Self:
        """Build the scorer of a run directory from its checkpoint "best" or "latest", or from a given checkpoint.

        dataset: dataset with the catalogue; None: the newest version of the run's.

        Averaged weights (`optim.ema`) are used if the run has them, until `close`.

        Raises:
            ValueError: as `load_run` and the class.
        """
        device = device or init_distributed()
        loaded = load_run(run, which, device, _in_one_process(run_config(run, dataset)))
        # pop_all moves the contexts to the scorer: they stay open until `close`, but end here if the constructor fails.
        with ExitStack() as stack:
            stack.enter_context(loaded.weights)
            stack.enter_context(merged(loaded.experiment.hllm))
            scorer = cls(loaded.experiment, micro_batch, table_dtype)
            scorer._weights = stack.pop_all()
        return scorer

    def close(self) -> None:
        """Restore the weights and adapters that `of_run` has replaced by averaged and merged ones."""
        self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @torch.no_grad()
    def read(self, history: UserHistory) -> UserState:
        """Encode a history (of any length, also empty).

        Raises:
            ValueError: users, items or actions outside the dataset's ids.
        """
        self._check(history)
        start = window_start(len(history), self.experiment.config.data.max_history)
        return UserState(history, start, self._read(history.since(start), None))

    @torch.no_grad()
    def extend(self, user: UserState, events: UserHistory) -> UserState:
        """Return the state after later events, equal to encoding all events at once; `user` is not changed.

        Raises:
            ValueError: as `read`; events of another user, or before the last one.
        """
        history = user.history.followed_by(events)
        start = window_start(len(history), self.experiment.config.data.max_history)
        # The cache is unusable if the window has moved, or if it is shorter than the prefix of context tokens, whose
        # positions see each other and so would change.
        if start != user.start or user.cache.length < self.hllm.user.context_prefix:
            return self.read(history)
        self._check(events)
        return UserState(history, start, self._read(events, user.cache))

    @torch.no_grad()
    def score(
        self, user: UserHistory | UserState, candidates: NDArray[np.integer], time: int | None = None
    ) -> NDArray[np.float32]:
        """Return logits [m] of candidates: the `score` of `hllm evaluate`, in the same order as the probabilities.

        Args:
            user: a history, or the result of `read` or `extend`.
            candidates: [m] item ids of the dataset; 0 is the unknown item.
            time: seconds UTC of the request; None: now. With a ranking dataset only events of earlier seconds (and
                older than `data.feedback_delay`) are visible; with a leave-one-out dataset all events are.

        Raises:
            ValueError: as `read`; candidates outside the dataset's ids, or a leave-one-out request before the
                last event.
        """
        state = self.read(user) if isinstance(user, UserHistory) else user
        items = np.asarray(candidates, np.int64)
        _check_ids("candidates", items, self.experiment.dataset.num_items)
        moment = int(clock.time()) if time is None else time
        with configured_by("user.shape", length="data.max_history"):
            return self._score(state, items, moment)

    def _score(self, state: UserState, items: Ints, moment: int) -> NDArray[np.float32]:
        """Logits [m] of items [m], `micro_batch` at a time."""
        ask = begin_request(self.hllm.user, state.cache, moment, self._visible(state, moment))
        # With late fusion the user vector does not depend on the candidates: compute it in the first micro-batch only.
        user_vector: Tensor | None = None
        found = np.empty(items.size, np.float32)
        for start in range(0, items.size, self.micro_batch):
            part = items[start : start + self.micro_batch]
            batch = self._request(state, part, moment).to(self.experiment.device)
            _, x_QD, target_XD, _ = self.hllm.slot_features(batch, self.hllm.item_embeddings(batch.unique_items))
            if self.hllm.fusion.query_is_user:
                user_vector = ask(x_QD) if user_vector is None else user_vector  # one [USER] for all candidates
            logits = self._logits(ask, x_QD, target_XD, user_vector)
            found[start : start + part.size] = logits.float().cpu().numpy()
        return found

    def _logits(self, ask: ScoreCandidates, x_QD: Tensor, target_XD: Tensor, user_vector: Tensor | None) -> Tensor:
        if user_vector is None:
            logits: Tensor = self.hllm.head(ask(x_QD))
        else:
            logits = self.hllm.head(user_vector.expand(target_XD.shape[0], -1), target_XD)
        return logits

    def _read(self, events: UserHistory, cache: HistoryCache | None) -> HistoryCache:
        """Append `events` to the cache."""
        # The collator drops history after the last exposure: one exposure after all events retains all of them.
        after = int(events.timestamps[-1]) + 1 + self.experiment.batch_spec.feedback_delay if len(events) else 0
        exposure = Events.at([after], labels=[0])
        whole = events.followed_by(UserHistory(events.user_id, **exposure.columns))
        batch = self._collator([whole.as_piece(len(events))], 0, 0).to(self.experiment.device)
        x_TD = self.hllm.slot_features(batch, self.hllm.item_embeddings(batch.unique_items))[0]
        with configured_by("user.shape", length="data.max_history"):
            return read_history(self.hllm.user, x_TD, batch.timestamps, cache)

    def _request(self, user: UserState, candidates: Ints, time: int) -> HybridBatch:
        """Batch of the candidates without history; numeric features are the user's at `time`."""
        asked = Events.at(np.full(candidates.size, time), item_ids=candidates, labels=np.zeros(candidates.size))
        batch = self._collator([Piece(**asked.columns, user_id=user.history.user_id, first_target=0)], 0, 0)
        names = self.experiment.batch_spec.numeric_features
        if not names:
            return batch
        # The request is an additional event without a label: its numbers come from the visible events before it.
        window = user.history.since(user.start)
        earlier = visible_before(window.timestamps, time - self.experiment.batch_spec.feedback_delay)
        times, labels = np.append(window.timestamps[:earlier], time), np.append(window.labels[:earlier], np.nan)
        numbers = numeric_columns(names, times, labels.astype(np.float32), np.array([earlier]))
        assert batch.numeric is not None
        # All candidates have the same time, so the one row of numbers is broadcast to all of them.
        numeric = batch.numeric.clone()
        numeric[: batch.query_times.numel()] = torch.from_numpy(numbers)
        return replace(batch, numeric=numeric)

    def _visible(self, user: UserState, time: int) -> int:
        """Number of cached events visible to a request at `time`."""
        if self.experiment.batch_spec.visibility == "second":
            limit = time - self.experiment.batch_spec.feedback_delay
            return visible_before(user.cache.times.cpu().numpy(), limit)
        last = int(user.history.timestamps[-1]) if len(user.history) else time
        if time < last:
            raise ValueError(
                f"user {user.history.user_id}: a request at {time}, before the last event at {last}: leave-one-out "
                "requests see all events; give the history up to the request"
            )
        return user.cache.length

    def _check(self, history: UserHistory) -> None:
        dataset = self.experiment.dataset
        _check_ids("user_id", np.array([history.user_id]), dataset.num_users)
        _check_ids(f"item_ids of user {history.user_id}", history.item_ids, dataset.num_items)
        _check_ids(f"actions of user {history.user_id}", history.actions, dataset.num_actions)


def _check_ids(name: str, ids: Ints, number: int) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= number))
    if wrong.size:
        raise ValueError(
            f"{name}, entry {int(wrong[0])}: {int(ids[wrong[0]])}: the dataset's ids go from 1 to {number - 1}, and "
            "0 is unknown; give 0 for ids added after `hllm prepare`, or prepare again"
        )


def _in_one_process(config: Config) -> Config:
    """The configuration without the options for several ranks and for training; the weights are the same."""
    parallel = replace(config.parallel, dense="ddp", compile=False, activation_checkpointing=False)
    return replace(config, parallel=parallel)
