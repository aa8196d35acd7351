"""Top-K recommendations of a trained run for a user of its dataset, with item texts.

A model with a ranking head scores the complete catalogue as candidates (`serving.Scorer`); a generative model compares
its predicted next item with all items. Both read the user's history from the dataset.
"""

import time as clock
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.bad_rows import MAX_SECOND, describe_time
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors
from hllm_torchrec.evaluation.run_loader import load_run, run_config
from hllm_torchrec.inference.new_items import NewItems
from hllm_torchrec.inference.user_embedder import history_request
from hllm_torchrec.serving.raw_context import ContextValue
from hllm_torchrec.serving.scorer import Scorer, UserHistory

_Scored = tuple[NDArray[np.float64], Dataset]


@dataclass(frozen=True)
class RecommendedItem:
    """An item with its text. text: joined text columns; score: probability or cosine, None for history items."""

    raw_id: str
    text: str
    score: float | None = None


@dataclass(frozen=True)
class Recommendations:
    """history: the user's events, oldest first; items: best first; scored_by: "probability" or "similarity"."""

    history: list[RecommendedItem]
    items: list[RecommendedItem]
    scored_by: str


def recommend(
    run: Path,
    user: str,
    top: int,
    device: torch.device,
    *,
    which: str = "best",
    time: int | None = None,
    include_seen: bool = False,
    dataset: Path | None = None,
    context: Mapping[str, ContextValue] | None = None,
) -> Recommendations:
    """Return at most `top` items for a user, from a checkpoint of a run. Runs in one process.

    Args:
        user: raw id.
        time: second (UTC) of the request; None: now. Only events before `time` - `data.feedback_delay` are read.
        include_seen: also recommend items of the history.
        dataset: dataset with the catalogue and the user's events; None: the newest version of the run's dataset.
        context: context of the request, as in `Scorer.score`.

    Raises:
        ValueError: the run, checkpoint or user does not exist; the context is invalid (`Scorer.score`); the user has no
            events that the request may see; `time` is outside 1970..2099; or `top` is below 1.
    """
    if top < 1:
        raise ValueError(f"top is {top}: must be at least 1")
    if time is not None and not 0 <= time <= MAX_SECOND:
        raise ValueError(f"{describe_time(str(time), time)}; give seconds UTC, 1970 to 2099")
    config = run_config(run, dataset)
    opened = Dataset.open(config.data.dataset, config.data.version)
    moment = int(clock.time()) if time is None else time
    history = history_before(opened, user, moment - config.data.feedback_delay)
    if config.objective.has_head:
        scores, opened = _probabilities(run, which, device, history, moment, dataset, context)
    else:
        scores, opened = _similarities(run, which, device, history, moment, dataset)
    scores[0] = -np.inf  # the unknown item
    scores[opened.excluded_items] = -np.inf
    if not include_seen:
        scores[history.item_ids] = -np.inf
    best = np.argsort(-scores, kind="stable")[:top]
    # Excluded items have the score -inf, so fewer than `top` items may remain.
    best = best[np.isfinite(scores[best])]
    read = item_reader(opened, config)
    return Recommendations(
        [RecommendedItem(*read(item)) for item in history.item_ids.tolist()],
        [RecommendedItem(*read(item), score) for item, score in zip(best.tolist(), scores[best].tolist(), strict=True)],
        "probability" if config.objective.has_head else "similarity",
    )


def history_before(dataset: Dataset, user: str, time: int) -> UserHistory:
    """Return all events of a user (raw id) before the second `time`.

    Raises:
        ValueError: the dataset has no such user, or no event of the user before `time`.
    """
    raw = dataset.users["raw_user_id"].to_pylist()
    if user not in raw:
        known = [name for name in raw if name is not None]  # the raw id of a forgotten user is None
        raise ValueError(
            f"user {user!r}: not in {dataset.root}{did_you_mean(user, known)}; it has {len(known):,} users"
        )
    dense = raw.index(user) + 1
    sequence = dataset.user_events(dense)
    events = visible_before(sequence.timestamps, time)
    if events:
        return UserHistory(dense, **sequence[:events].columns)
    raise ValueError(f"user {user!r}: no event before {time}; name a later time")


def _probabilities(
    run: Path,
    which: str,
    device: torch.device,
    history: UserHistory,
    time: int,
    dataset: Path | None,
    context: Mapping[str, ContextValue] | None,
) -> _Scored:
    """Predictions [N] of the first task for all items, and the dataset including items added after `hllm prepare`."""
    with Scorer.of_run(run, which, device, dataset=dataset) as scorer:
        read = scorer.experiment.dataset
        found = scorer.score_tasks(history, np.arange(scorer.num_items), time, context)
    return next(iter(found.values())).astype(np.float64), read


def _similarities(
    run: Path, which: str, device: torch.device, history: UserHistory, time: int, dataset: Path | None
) -> _Scored:
    """Cosines [N] of the predicted next item and all items, and the dataset including items added after preparation."""
    loaded = load_run(run, which, device, dataset=dataset)
    experiment = loaded.experiment
    piece = history_request(history.as_piece(), len(history), time, experiment.config.data.max_history)
    experiment.model.eval()
    with loaded.weights, experiment.evaluation_items(), torch.no_grad():
        NewItems(experiment)
        catalogue = catalogue_vectors(experiment)
        batch = experiment.request_collator()([piece], 0, 0)
        predicted = experiment.model(batch.to(device), want_next=True).next_items
    assert predicted is not None, "a model without a prediction head has a generative loss"
    cosines = normalize(catalogue.float(), dim=-1) @ normalize(predicted[0].float(), dim=-1)
    return cosines.double().cpu().numpy(), experiment.dataset


def item_reader(dataset: Dataset, config: Config) -> Callable[[int], tuple[str, str]]:
    """Return a function: dense item id -> (raw id, text).

    The text joins the columns of `item_llm.text_keys` that the dataset has; if there are none, all text columns.
    """
    known = dataset.manifest["text_columns"]
    keys = [key for key in config.item_llm.text_keys if key in known] or known
    texts, raw = dataset.text(keys), dataset.items["raw_item_id"]

    def read(item: int) -> tuple[str, str]:
        if item == 0:
            return "?", "an unknown item"
        values = (str(texts[key][item - 1].as_py() or "") for key in keys)
        return str(raw[item - 1].as_py()), " · ".join(value for value in values if value)

    return read
