"""Retrieval of candidates from the catalogue: the items nearest to the predicted next item, or all items.

A model with a generative loss predicts the next item at the last event that a request may see. FAISS finds the items
nearest to the prediction by cosine, exactly (flat) or within the nearest cells (ivf). Without a generative loss, or
with the index "none", all items are candidates, and the head ranks them: exact, in time proportional to the catalogue.

Legend: N items, V width of an item's vector in the space of the generative loss, E width of a text embedding, R rank of
the transitions, T history positions, D user width.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors, vectors_of_items
from hllm_torchrec.inference.item_index import ItemIndex, normalize_rows
from hllm_torchrec.modules.history_cache import begin_request
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.user_state import UserState
from hllm_torchrec.store.export_formats import import_faiss

Mask = NDArray[np.bool_]
NPROBE = 16
"""Number of cells of an ivf index that are searched."""
RANKED = 100_000
"""Largest catalogue of which all items are ranked for a user without events."""
SAMPLE = 64
"""Number of items per cell on which an ivf index is fitted."""
IndexKind = Literal["flat", "ivf", "none"]


def first_allowed(order: Ints, allowed: Mask, number: int) -> Ints:
    """The first `number` allowed items of `order` [N]; reads prefixes of growing length instead of all N items."""
    end = 4 * number
    while True:
        found = order[:end][allowed[order[:end]]]
        if found.size >= number or end >= order.size:
            return found[:number]
        end *= 4


def _flat(vectors: Floats) -> Any:
    return ItemIndex.build(vectors, np.arange(len(vectors))).index


def _cells(vectors: Floats, folder: Path | None) -> Any:
    """An ivf index of about sqrt(N) cells: read from `folder` if it was built there for exactly these vectors, else
    built, and stored there in place of older ones."""
    faiss, cells = import_faiss(), round(len(vectors) ** 0.5)
    name = f"index-{blake2b(vectors.data, digest_size=8, person=f'ivf{cells}'.encode()).hexdigest()}.faiss"
    if folder is not None and (folder / name).is_file():
        return faiss.read_index(str(folder / name))
    index = ItemIndex.build(vectors, np.arange(len(vectors)), "ivf", cells, points_of_cell=SAMPLE).index
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        faiss.write_index(index, str(folder / f"{name}.part"))
        (folder / f"{name}.part").replace(folder / name)
        for old in set(folder.glob("index-*.faiss")) - {folder / name}:
            old.unlink(missing_ok=True)
    return index


class Retrieval:
    """Candidates for the users of a scorer.

    kind: kind of the index; "none": all items are candidates. folder: folder that stores an ivf index for the next
    start; None: the index is built at every start.
    """

    def __init__(self, scorer: BatchScorer, kind: IndexKind = "flat", folder: Path | None = None) -> None:
        experiment = scorer.experiment
        self._scorer, self._masks = scorer, lru_cache(maxsize=256)(self._mask_of)
        self._base = experiment.dataset.num_table_items
        self._index: Any = None
        if kind != "none" and scorer.hllm.generates:
            vectors = catalogue_vectors(experiment).float().cpu().numpy()[: self._base]
            vectors[0] = 0  # the unknown item
            self._index = _flat(vectors) if kind == "flat" else _cells(vectors, folder)
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Read items that were added after `hllm prepare`; they are few, so they are compared without an index."""
        self._of = self._scorer.experiment.dataset  # the scorer replaces this object after each change
        self._masks.cache_clear()
        if self._index is not None:
            later = np.arange(self._base, self._scorer.experiment.dataset.num_items)
            found = vectors_of_items(self._scorer.experiment, later) if later.size else torch.empty(0, self._index.d)
            self._later = normalize_rows(found.cpu().numpy())
            if self._scorer.num_items > RANKED:
                self._by_events = np.argsort(-self._of.training_item_counts(), kind="stable")

    def allowed(self, exclude: Ints, filters: Mapping[str, Sequence[str]]) -> Mask:
        """Mask [N] of the items that may be recommended.

        These items are known, not forgotten or withdrawn, not in `exclude`, and have at least one value of each filter.

        Raises:
            ValueError: a filter is not an item feature of the dataset.
        """
        if self._scorer.experiment.dataset is not self._of:
            self._refresh()
        mask = np.ones(self._scorer.num_items, bool)
        for name, values in filters.items():
            of_values = np.zeros(self._scorer.num_items, bool)
            for value in values:
                found = self._masks(name, value)
                of_values[: found.size] |= found[: of_values.size]
            mask &= of_values
        mask[0] = False
        mask[self._of.excluded_items] = False
        mask[exclude[exclude < mask.size]] = False
        return mask

    @torch.no_grad()
    def candidates(self, state: UserState, allowed: Mask, number: int) -> Ints:
        """Dense ids of at most `number` allowed items, nearest first.

        Without an index the result is all allowed items. With an index, a user without events gets all allowed items if
        the catalogue has at most RANKED items, else the `number` allowed items with the most training events.
        """
        vector = None if self._index is None else self._next_item(state)
        if vector is None:
            ranks_all = self._index is None or allowed.size <= RANKED
            return np.flatnonzero(allowed) if ranks_all else first_allowed(self._by_events, allowed, number)
        faiss = import_faiss()
        selector = faiss.IDSelectorBitmap(np.packbits(allowed[: self._base], bitorder="little"))
        parameters = faiss.SearchParameters(sel=selector)
        if isinstance(self._index, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=NPROBE)
        (scores,), (ids,) = self._index.search(vector[None], number, params=parameters)
        later = np.flatnonzero(allowed[self._base : self._base + len(self._later)])
        scores = np.concatenate([scores, self._later[later] @ vector])
        ids = np.concatenate([ids, self._base + later])
        best = np.argsort(-scores, kind="stable")
        found: Ints = ids[best][ids[best] >= 0][:number]  # -1: the index has fewer
        return found

    def _next_item(self, state: UserState) -> Floats | None:
        """Predicted next item [V], of norm 1, from the state's last position; None if the state has no events."""
        cache, hllm = state.cache, self._scorer.hllm
        if not cache.length:
            return None
        # The hidden state at the last position is not cached. A query with the inputs of the last event, which sees
        # the positions before it and itself, has the same hidden state.
        read = self._scorer.experiment.batch_spec.history
        rows = np.flatnonzero(state.history.labels == 1) if read == "positive" else np.arange(len(state.history))
        x_TD, times = self._scorer.inputs.history(state.history[rows[-1:]])
        hidden = begin_request(hllm.user, cache, int(times[-1]), cache.length - 1)(x_TD[-1:])
        predicted = hllm.project_next(hidden)
        predicted = hllm.joined(predicted, *self._history_sums(state, rows))
        vector: Floats = normalize_rows(predicted.float().cpu().numpy())[0]
        return vector

    def _history_sums(self, state: UserState, rows: Ints) -> tuple[Tensor | None, Tensor | None]:
        """Decayed sums of the text embeddings [1, E] and of the transitions [1, R + 1] over the events `rows` that are
        in the state's window; None if the model does not use them."""
        hllm, experiment, texts, transitions = self._scorer.hllm, self._scorer.experiment, None, None
        ids = torch.tensor(state.history.item_ids[rows[rows >= state.start]], device=experiment.device)
        offsets = torch.tensor([0, ids.numel()], device=ids.device)
        if hllm.text_similarity is not None:
            items = hllm.item_embeddings(ids)
            assert items is not None, "similarity of texts needs an Item LLM"
            texts = hllm.text_similarity.history(hllm.text_embeddings(ids, items), offsets)[-1:]
        if hllm.transitions is not None:
            transitions = hllm.transitions.history(ids, offsets)[-1:]
        return texts, transitions

    def _mask_of(self, name: str, value: str) -> Mask:
        """Mask [N] of the items that have a value of an item feature."""
        dataset = self._scorer.experiment.dataset
        known = dataset.manifest["item_features"]
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"filters.{name}: no item feature{hint}; there are {', '.join(known) or 'none'}")
        values = dataset.feature_values(name).to_pylist()
        if value not in values:
            return np.zeros(dataset.num_items, bool)
        ids, offsets = dataset.feature_ids("item", name)
        hits = np.concatenate([[0], np.cumsum(ids == values.index(value) + 1)])
        found: Mask = hits[offsets[1:]] > hits[offsets[:-1]]
        return found
