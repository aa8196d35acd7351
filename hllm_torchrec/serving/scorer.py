"""Scoring of candidates for serving: the history is encoded once and cached, candidates are scored in micro-batches.

    with Scorer.of_run(Path("runs/early")) as scorer:
        user = scorer.read(UserHistory(7, item_ids, timestamps, labels, actions))
        logits = scorer.score(user, candidates, time)          # any number of times for one encoding of the history
        user = scorer.extend(user, UserHistory(7, ...))        # later events; only these are computed
        scorer.score(scorer.history("u7", ["s3", "s9"], times), ["s3", "s41"], time)    # by raw ids
        scorer.add_items(["s41"], {"title": ["A new book"]})   # an item that came after `hllm prepare`

Features are computed by the collator and the model that training uses. Scores equal those of `hllm evaluate` for the
same exposures up to rounding, also if a history is longer than `data.max_history` (`window_start`).

Legend: n events, T history positions that the model uses, m candidates, M candidates of all requests, Q queries and X
targets of a micro-batch, O outputs of all tasks, F evidence columns, D width.
"""

import time as clock
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.errors import configured_by
from hllm_torchrec.common.hashing import hash_json
from hllm_torchrec.data.new_item_journal import new_items
from hllm_torchrec.data.past_events import Exposures, PastEvents
from hllm_torchrec.data.pieces import window_start
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.evaluation.calibration import RunCalibration
from hllm_torchrec.evaluation.run_loader import load_run, run_config, weights_fingerprint
from hllm_torchrec.inference.new_items import NewItems
from hllm_torchrec.inference.quantization import check_table_type, quantize_items, quantize_tables
from hllm_torchrec.inference.raw_ids import raw_texts
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.stored_items import read_catalogue
from hllm_torchrec.modules.attention.keys_values import HistoryCache, ScoreCandidates
from hllm_torchrec.modules.history_cache import MICRO_BATCH, begin_request, check_encoder, read_history
from hllm_torchrec.modules.lora import merged
from hllm_torchrec.serving.raw_context import ContextValue, RawContext
from hllm_torchrec.serving.raw_histories import RawHistories, check_found, check_ids, of_user
from hllm_torchrec.serving.request_rules import RequestRules, candidates_batch, history_batch
from hllm_torchrec.serving.scorer_loading import calibration_of, check_servable, in_one_process
from hllm_torchrec.serving.task_scores import output_shape, predictions_by_task
from hllm_torchrec.serving.user_state import UserHistory, UserState

__all__ = ["Scorer", "UserHistory", "UserState", "window_start"]


class Scorer:
    """Scores candidates for any user with a trained model, in one process.

    Use `Scorer.of_run`, or pass an experiment whose model has loaded weights.

    Args:
        experiment: see `build_experiment`; its model is put into evaluation mode, and the complete catalogue is
            encoded once by the Item LLM.
        micro_batch: candidates computed at a time; it bounds memory and does not change scores beyond rounding.
        table_dtype: data type of tables and item embeddings, "int8" or "fp16", see `inference.quantization`; the
            model can then not be trained. None: as trained.
        journal: file of the items that came after `hllm prepare`, read and written by all processes that serve this
            dataset; None: the dataset's own.

    Raises:
        ValueError: a model without a ranking head, more than one process, FSDP, an encoder without a cache, a
            micro-batch below 1, an unknown `table_dtype`, or a damaged journal.
    """

    def __init__(
        self,
        experiment: Experiment,
        micro_batch: int = MICRO_BATCH,
        table_dtype: str | None = None,
        journal: Path | None = None,
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch is {micro_batch}: must be at least 1")
        if table_dtype is not None:
            check_table_type(table_dtype)
        check_servable(experiment)
        self.experiment, self.micro_batch = experiment, micro_batch
        self.rules = RequestRules(experiment.batch_spec, experiment.config.data.max_history)
        """Rules that select the events of a history that a request may see."""
        self.hllm = experiment.hllm.eval()
        with configured_by("user.shape", encoder="user.encoder"):
            check_encoder(self.hllm.user)
        if table_dtype is None:
            experiment.use_cached_items()
        else:
            quantize_tables(experiment, table_dtype)
            quantize_items(experiment, table_dtype)
        self._weights = ExitStack()
        self._calibration: RunCalibration | None = None
        # A random mark: states are accepted only by the scorer that made them. `of_run` replaces it by a hash of the
        # weights and the dataset, so that scorers of the same run accept each other's states.
        self._mark = uuid.uuid4().hex[:16]
        self._lock = Lock()
        self.new_items = NewItems(experiment, journal)
        """Items that came after `hllm prepare`."""
        self._raw_ids = RawHistories(experiment.dataset)
        self._context = RawContext(experiment.dataset, experiment.batch_spec.context)
        self._make_collator()

    def _make_collator(self) -> None:
        # All candidates of a request have the same time. Visibility by second hides events of the same second, so
        # candidates do not see each other.
        spec = replace(self.experiment.batch_spec, visibility="second")
        self._collator = self.experiment.request_collator(spec)
        # Assigned last: from now on other threads accept dense ids below `num_items`.
        self.num_items = self.experiment.dataset.num_items
        """Upper bound (exclusive) of the dense ids: items of the dataset and those added after `hllm prepare`."""

    @classmethod
    def of_run(
        cls,
        run: Path,
        which: str = "best",
        device: torch.device | None = None,
        micro_batch: int = MICRO_BATCH,
        table_dtype: str | None = None,
        journal: Path | None = None,
        *,
        dataset: Path | None = None,
        store: Path | None = None,
    ) -> Self:
        """Build the scorer of a run directory from its checkpoint "best" or "latest", or from a given checkpoint.

        dataset: dataset with the catalogue; None: the newest version of the run's dataset. store: item embeddings of
        this run (`hllm embed --items`), which are read instead of encoding the catalogue; scores then differ by the
        rounding of the store. None: encode the catalogue, or read the store that the run's configuration names.

        Averaged weights (`optim.ema`) are used until `close` if the run has them.

        Raises:
            ValueError: as `load_run` and the constructor; or the store is of another Item LLM, or lacks items.
        """
        device = device or init_distributed()
        config = in_one_process(run_config(run, dataset))
        loaded = load_run(run, which, device, config, encode=store is None)
        # pop_all moves the contexts to the scorer: they stay open until `close`, but end here if the constructor fails.
        with ExitStack() as stack:
            stack.enter_context(loaded.weights)
            stack.enter_context(merged(loaded.experiment.hllm))
            known = loaded.experiment.dataset.num_items
            if store is not None:
                read_catalogue(loaded.experiment, str(store))
            scorer = cls(loaded.experiment, micro_batch, table_dtype, journal)
            facts = [weights_fingerprint(loaded.checkpoint), table_dtype, known]
            scorer._mark = hash_json(facts if store is None else [*facts, str(store)])[:16]
            scorer._calibration = calibration_of(loaded)
            scorer._weights = stack.pop_all()
        return scorer

    @property
    def mark(self) -> str:
        """After `of_run`, hash of the weights, their data type, the dataset's number of items and the path of a given
        store; otherwise random. Scorers with equal marks accept each other's states."""
        return self._mark

    @property
    def calibration(self) -> RunCalibration | None:
        """Calibration of the run, or None if it was not calibrated."""
        return self._calibration

    @property
    def unknown_context(self) -> dict[str, int]:
        """Context column -> number of categorical values that were read as unknown.

        A value that the dataset does not have counts once per request. A value that only training lacks counts once per
        query that is computed: `Scorer` with early fusion computes one per candidate, otherwise one per micro-batch;
        `BatchScorer` computes one per request.
        """
        unseen = {} if self.experiment.context is None else self.experiment.context.unseen
        return dict(self._context.unknown + Counter(unseen))

    def close(self) -> None:
        """Restore the weights and adapters that `of_run` has replaced by averaged and merged ones."""
        self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_items(
        self,
        raw_ids: Sequence[str],
        texts: Mapping[str, Sequence[str]],
        features: Mapping[str, Sequence[str | Sequence[str]]] | None = None,
    ) -> int:
        """Add items that came after `hllm prepare`, for every process that serves this dataset.

        The items are written to the journal and encoded. The model has no ID embedding for them, and uses their texts
        and features. Items of the dataset, and added items whose texts and features are the given ones, do not change.

        Args:
            raw_ids: [n], as in the source.
            texts: text column -> [n] texts; a column that is not given is empty.
            features: item feature -> [n] values, each a string or several strings; a value that the dataset does not
                have is read as the unknown value.

        Returns:
            Number of new or changed items that this scorer read from the journal, including those that other processes
            added meanwhile.

        Raises:
            ValueError: an id is not a string, or is given twice; a column is unknown; the journal cannot be written.
        """
        items = new_items(self.experiment.dataset, raw_ids, texts, features)
        with self._lock:
            added = self._refresh()  # first read the items of other processes, so that they are not added again
            missing = self.new_items.missing(items)
            if missing:
                self.new_items.journal.append(missing)
                added += self._refresh()
            return added

    def refresh(self) -> int:
        """Read the items that other processes have added or changed; return their number.

        A request with an unknown raw id calls this automatically.
        """
        with self._lock:
            return self._refresh()

    def _refresh(self) -> int:
        found = self.new_items.refresh()
        if found:
            self._make_collator()
        return found

    def item_ids(self, items: Any, what: str = "candidates") -> Ints:
        """Return the dense ids [n] of raw ids (strings), or check dense ids (integers; 0: unknown).

        Raises:
            ValueError: an id is not known (the message gives its index or the raw id), or raw and dense ids are mixed.
        """
        raw = raw_texts(items, what)
        if raw is None:
            ids = np.asarray(items, np.int64)
            check_ids(what, ids, self.num_items)
            return ids
        ids = self._find(raw)
        if (ids < 0).any():
            self.refresh()
            ids = self._find(raw)
        check_found(what, ids, raw, "register items that came after `hllm prepare` with add_items (POST /v1/items)")
        return ids

    def _find(self, raw: list[str]) -> Ints:
        ids = self.new_items.find(raw)
        return np.where(ids < self.num_items, ids, -1)

    def raw_item_ids(self, ids: Ints) -> list[str]:
        """Raw ids of dense ids [n], each at least 1."""
        raw: list[str] = self.experiment.dataset.items["raw_item_id"].take(pa.array(ids - 1)).to_pylist()
        return raw

    def history(
        self,
        user: str | None,
        items: Sequence[str],
        timestamps: ArrayLike,
        labels: ArrayLike | None = None,
        actions: Sequence[str | None] | None = None,
    ) -> UserHistory:
        """Build a history from raw ids.

        Args:
            user: raw id; None: a user who came after `hllm prepare`.
            items: [n] raw ids.
            timestamps: [n] seconds UTC, not decreasing.
            labels: [n], NaN for events that are not exposures; None: no event is an exposure.
            actions: [n] names of actions, as in the source; None, for all events or a single one: unknown.

        Raises:
            ValueError: ids or actions that are not known, and as `UserHistory`.
        """
        ids = self.item_ids(items, f"items {of_user(user)}") if len(items) else np.zeros(0, np.int64)
        return self._raw_ids.history(user, ids, timestamps, labels, actions)

    @torch.no_grad()
    def read(self, history: UserHistory) -> UserState:
        """Encode a history, which may have any length, also 0.

        Raises:
            ValueError: an id of a user, item or action is outside the range of the dataset.
        """
        self._check(history)
        start = self.rules.start(len(history))
        return self._state(history, start, self._read(history.since(start), None))

    @torch.no_grad()
    def extend(self, user: UserState, events: UserHistory) -> UserState:
        """Return the state after later events, equal to encoding all events at once; `user` is not changed.

        Raises:
            ValueError: as `read`; the events are of another user, or earlier than the last event of `user`.
        """
        self._check_state(user)
        history = user.history.followed_by(events)
        start = self.rules.start(len(history))
        # The cache cannot be extended if the window has moved, or if the cache is shorter than the prefix of context
        # tokens: these positions see each other, so new ones would change the cached ones.
        if start != user.start or user.cache.length < self.hllm.user.context_prefix:
            return self.read(history)
        self._check(events)
        return self._state(history, start, self._read(events, user.cache))

    def _state(self, history: UserHistory, start: int, cache: HistoryCache) -> UserState:
        state = UserState(history, start, cache, self._mark, self._past(history, len(history)))
        return replace(state, mark=self._mark_of(state))

    def _mark_of(self, user: UserState) -> str:
        """The mark of a state: the scorer's mark and, if the history has added items, the name of the journal that
        assigns their dense ids."""
        known = self.experiment.dataset.num_table_items
        return f"{self._mark}/{self.new_items.name}" if user.highest_item >= known else self._mark

    def _check_state(self, user: UserState) -> None:
        if user.highest_item >= self.num_items:
            self.refresh()  # the scorer that made this state has read more of the journal
        mark = self._mark_of(user)
        if user.mark != mark:
            raise ValueError(
                f"user {user.history.user_id}: this state was made by another model, or from another dataset or "
                f"journal (mark {user.mark}, here {mark}): read the history again"
            )

    @torch.no_grad()
    def score(
        self,
        user: UserHistory | UserState,
        candidates: NDArray[np.integer] | Sequence[str],
        time: int | None = None,
        context: Mapping[str, ContextValue] | None = None,
    ) -> NDArray[np.float32]:
        """Return the logits [m] of candidates, the `score` of `hllm evaluate`. Calibration does not change them.

        Args:
            user: a history, or the result of `read` or `extend`.
            candidates: [m] raw ids (strings), or dense ids of the dataset (integers; 0 is the unknown item). The raw
                id "242" and the dense id 242 are different items.
            time: seconds UTC of the request; None: now. With a ranking dataset only events of earlier seconds (and
                older than `data.feedback_delay`) are visible; with a leave-one-out dataset all events are.
            context: name -> string or number, for every context column that the model reads (`data.context`); None is
                the unknown value. A string that did not occur in training is read as unknown, and counted in
                `unknown_context`.

        Raises:
            ValueError: as `read`; a context value is missing or has an unknown name; a candidate is not known; the
                state was made by another model; or a leave-one-out request is earlier than the last event.
        """
        outputs = self._outputs(user, candidates, time, context)
        return outputs if outputs.ndim == 1 else outputs[:, 0]

    @torch.no_grad()
    def score_tasks(
        self,
        user: UserHistory | UserState,
        candidates: NDArray[np.integer] | Sequence[str],
        time: int | None = None,
        context: Mapping[str, ContextValue] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Return task name -> predictions [m] of the candidates: probabilities, or numbers in the label's unit.

        The arguments are those of `score`. Probabilities are calibrated if the run is (`hllm calibrate`). If a task's
        label is declared `given` another label, the prediction is conditional on it (a like given a click).
        """
        return self.predictions(self._outputs(user, candidates, time, context))

    def predictions(self, outputs: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Task name -> predictions [m], calibrated if the run is, from logits [m] or outputs [m, O]."""
        return predictions_by_task(self.hllm, outputs, self._calibration)

    def _outputs(
        self,
        user: UserHistory | UserState,
        candidates: NDArray[np.integer] | Sequence[str],
        time: int | None,
        context: Mapping[str, ContextValue] | None,
    ) -> NDArray[np.float32]:
        """Logits [m], or outputs [m, O] of a model with several tasks."""
        state = self.read(user) if isinstance(user, UserHistory) else user
        self._check_state(state)
        items = self.item_ids(candidates)
        moment = int(clock.time()) if time is None else time
        seen = self.rules.seen(state.history, moment)
        # If the history has events after the request, the request's window may start before the state's.
        if self.rules.start(seen) != state.start:
            state = self.read(UserHistory(state.history.user_id, **state.history[:seen].columns))
        with configured_by("user.shape", length="data.max_history"):
            return self._score(state, items, moment, self._context.columns(context, 1))

    def _score(
        self, state: UserState, items: Ints, moment: int, context: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """Outputs of the head for items [m], `micro_batch` at a time."""
        ask = begin_request(self.hllm.user, state.cache, moment, self.rules.visible(state, moment))
        # With late fusion the user vector does not depend on the candidates: compute it in the first micro-batch only.
        user_vector: Tensor | None = None
        found = np.empty((items.size, *output_shape(self.hllm)), np.float32)
        for start in range(0, items.size, self.micro_batch):
            part = items[start : start + self.micro_batch]
            asked = candidates_batch(self._collator, state, part, moment, context, self.rules.numbers(state, moment))
            batch = asked.to(self.experiment.device)
            _, x_QD, target_XD, _ = self.hllm.slot_features(batch, self.hllm.item_embeddings(batch.unique_items))
            if self.hllm.fusion.query_is_user:
                user_vector = ask(x_QD) if user_vector is None else user_vector  # one [USER] query for all candidates
            evidence = self._evidence([state], [part.size], part, [moment])
            logits = self._logits(ask, x_QD, target_XD, user_vector, evidence)
            found[start : start + part.size] = logits.float().cpu().numpy()
        return found

    def _logits(
        self,
        ask: ScoreCandidates,
        x_QD: Tensor,
        target_XD: Tensor,
        user_vector: Tensor | None,
        evidence: Tensor | None,
    ) -> Tensor:
        if user_vector is None:
            logits: Tensor = self.hllm.head(ask(x_QD), None, evidence)
        else:
            logits = self.hllm.head(user_vector.expand(target_XD.shape[0], -1), target_XD, evidence)
        return self.hllm.biased(logits)

    def _past(self, history: UserHistory, seen: int) -> PastEvents | None:
        """What evidence needs of the first `seen` events of a complete history (not cut to `data.max_history`)."""
        evidence = self.experiment.evidence
        return None if evidence is None else evidence.past(history[:seen], np.array([seen]))

    def _evidence(
        self, states: Sequence[UserState], sizes: Sequence[int], items: Ints, times: Sequence[int]
    ) -> Tensor | None:
        """Evidence [M, F] of the candidates `items` [M] of several requests, `sizes[r]` of request r; None for a model
        without evidence."""
        evidence = self.experiment.evidence
        if evidence is None:
            return None
        pasts = []
        for state, time in zip(states, times, strict=True):
            past, seen = state.past, self.rules.seen(state.history, time)
            if past is None or seen != len(state.history):  # the state has events that the request must not see
                past = self._past(state.history, seen)
            assert past is not None
            pasts.append(past)
        asked = Exposures(pasts, sizes, np.repeat(np.arange(len(sizes)), sizes), items, np.repeat(times, sizes))
        return torch.from_numpy(evidence.of_exposures(asked)).to(self.experiment.device)

    def _read(self, events: UserHistory, cache: HistoryCache | None) -> HistoryCache:
        """Return the cache followed by the keys and values of `events`; cache: None if it is empty."""
        batch = history_batch(self._collator, self.rules.spec, events).to(self.experiment.device)
        x_TD = self.hllm.slot_features(batch, self.hllm.item_embeddings(batch.unique_items))[0]
        with configured_by("user.shape", length="data.max_history"):
            return read_history(self.hllm.user, x_TD, batch.timestamps, cache)

    def _check(self, history: UserHistory) -> None:
        dataset = self.experiment.dataset
        check_ids("user_id", np.array([history.user_id]), dataset.num_users)
        check_ids(f"item_ids of user {history.user_id}", history.item_ids, self.num_items)
        check_ids(f"actions of user {history.user_id}", history.actions, dataset.num_actions)
