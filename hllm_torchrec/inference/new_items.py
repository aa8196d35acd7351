"""Items that were added after the dataset was prepared: the model knows their texts and features, but not their IDs.

    new = NewItems(experiment)          # reads <dataset>/new_items.jsonl, see `data.new_item_journal`
    new.refresh()                       # reads lines that any process has appended, and encodes only their texts

A new item gets the next id after those of the dataset, in the order of the journal: N, N + 1, ... Its vector is the sum
of the encoded text, the row of the unknown item in the ID table, and the rows of its features (the unknown id for
unknown values); dense features are zeros. When a later version of the dataset has the item with an id of its own, the
line in the journal is ignored.

Legend: N items of the dataset (including the unknown item 0), n new items, E width of an item's embedding.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.jagged_arrays import offsets_from_lengths
from hllm_torchrec.data.new_item_journal import JOURNAL, NewItem, NewItemJournal
from hllm_torchrec.data.token_store import TokenStore, laid_out_texts, read_tokenizer, tokenize
from hllm_torchrec.data.tombstones import ITEMS
from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.inference.raw_ids import RawIds
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import JoinedItems, LiveItems, StoredItems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DatasetWithNewItems(Dataset):
    """A dataset followed by new items, which have rows in `items`, texts and features, but not in ID tables."""

    def __init__(self, base: Dataset, new: Sequence[NewItem]) -> None:
        self.__dict__.update(base.__dict__)
        self._base, self._new = base, list(new)

    @property
    def num_items(self) -> int:
        """Largest item id + 1, new items included."""
        return self._base.num_items + len(self._new)

    @property
    def num_table_items(self) -> int:
        """Rows of an item table: only those of the dataset."""
        return self._base.num_table_items

    @property
    def items(self) -> pa.Table:
        """Rows of the dataset's items, then rows of the new items."""
        return self._items

    @cached_property
    def _items(self) -> pa.Table:
        base, texts = self._base.items, self.manifest["text_columns"]
        columns: dict[str, pa.Array] = {
            "item_id": pa.array(range(self._base.num_items, self.num_items), pa.int64()),
            "raw_item_id": pa.array([item.id for item in self._new], pa.string()),
        }
        columns |= {name: pa.array([item.text.get(name, "").strip() for item in self._new]) for name in texts}
        for name in self.manifest["item_features"]:
            columns[f"feature_{name}"] = self._encoded(name)
        rows = [columns.get(f.name, pa.nulls(len(self._new), f.type)).cast(f.type) for f in base.schema]
        return pa.concat_tables([base, pa.table(rows, schema=base.schema)])

    def _encoded(self, name: str) -> pa.Array:
        """Ids of a feature's values for the new items: list<int32> [n]; 0 for values that the dataset does not have."""
        ids = {value: number for number, value in enumerate(self._base.feature_values(name).to_pylist(), 1)}
        values = [[ids.get(value.strip(), 0) for value in item.features.get(name, [])] for item in self._new]
        return pa.array(values, pa.list_(pa.int32()))

    def text(self, columns: Sequence[str]) -> pa.Table:
        """The named text columns of all items."""
        base = self._base.text(columns)
        return pa.concat_tables([base, self.new_text(columns).cast(base.schema)])

    def new_text(self, columns: Sequence[str]) -> pa.Table:
        """The named text columns of the new items."""
        return self._items.select(list(columns)).slice(self._base.num_items - 1)

    def training_item_counts(self) -> np.ndarray:
        """Number of events of each item in train, int64 [num_items]; 0 for new items."""
        return np.pad(self._base.training_item_counts(), (0, len(self._new)))

    def feature_ids(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Bags of a feature as in the base class, followed by those of the new items."""
        values, offsets = self._base.feature_ids(kind, name)
        if kind != "item" or not self._new:
            return values, offsets
        bags = self._items[f"feature_{name}"].slice(self._base.num_items - 1).to_pylist()
        more = np.array([value for bag in bags for value in bag], np.int64)
        ends = offsets[-1] + np.cumsum([len(bag) for bag in bags])
        return np.concatenate([values, more]), np.concatenate([offsets, ends])


class NewItems:
    """The new items of an experiment; `refresh` adds them to its dataset and to its model's source of items.

    The model must have its weights and a source of all items of the dataset (a cache, a store or a quantized table).

    Args:
        path: path of the journal; None: the journal in the dataset's folder, or no journal if the dataset is at a URL.

    Raises:
        ValueError: the journal is damaged.
    """

    def __init__(self, experiment: Experiment, path: Path | None = None) -> None:
        self._experiment, self._base, self._source = experiment, experiment.dataset, experiment.hllm.item_source
        self._base_vectors, self._base_evidence = experiment.item_vectors, experiment.evidence
        if path is None and url_of(experiment.config.data.dataset) is None:
            path = experiment.dataset.root / JOURNAL
        self._journal = None if path is None else NewItemJournal(path)
        self._items: dict[str, NewItem] = {}
        self._numbers: dict[str, int] = {}
        self._vectors: Tensor | None = None
        self._end, self.name = 0, ""
        self.refresh()

    @property
    def journal(self) -> NewItemJournal:
        """The journal of the new items.

        Raises:
            ValueError: the dataset is at a URL, and no path of a journal was given.
        """
        if self._journal is None:
            raise ValueError(
                f"data.dataset: {self._experiment.config.data.dataset}: a dataset at a URL has no journal of new "
                "items: give `journal`, a file that all processes can write to"
            )
        return self._journal

    @cached_property
    def _known(self) -> RawIds:
        return RawIds(self._base.items["raw_item_id"])

    def find(self, raw_ids: Sequence[str]) -> Ints:
        """Ids int64 [n] of raw ids of items in the dataset and of new items; -1: unknown."""
        found = self._known.find(raw_ids)
        for row in np.flatnonzero(found < 0).tolist():
            found[row] = self._numbers.get(raw_ids[row], -1)
        return found

    def missing(self, items: Sequence[NewItem]) -> list[NewItem]:
        """The `items` that are new or changed, and neither in the dataset nor forgotten."""
        unknown = self._known.find([item.id for item in items]) < 0
        return [
            item
            for item, new in zip(items, unknown)
            if new and self._items.get(item.id) != item and self._base.tombstones.find(ITEMS, item.id) is None
        ]

    @torch.no_grad()
    def refresh(self) -> int:
        """Read and encode items appended to the journal; returns the number of new or changed items. Collective.

        Raises:
            ValueError: the journal is damaged.
        """
        journal, end = self._journal, self._end
        if journal is None:
            return 0
        lines = run_on_rank_zero(lambda: journal.read(end))
        self._end, self.name = lines.end, self.name or lines.name
        latest = {item.id: item for item in lines.items}  # the last line of an item counts
        changed = self.missing(list(latest.values())) if latest else []
        if changed:
            self._take(changed)
        return len(changed)

    def _take(self, changed: Sequence[NewItem]) -> None:
        """Encode new and changed items; add them to the model's items, the dataset and the ids that `find` knows."""
        items = self._items | {item.id: item for item in changed}  # a known item keeps its index, and so its id
        numbers = {raw: self._base.num_items + index for index, raw in enumerate(items)}
        experiment, first = self._experiment, self._base.num_items
        vectors = self._encoded(DatasetWithNewItems(self._base, changed))
        # This order lets other threads keep scoring: `find` returns an id only after all other parts have the item.
        if vectors is not None:
            assert self._source is not None
            old = vectors[:0] if self._vectors is None else self._vectors
            self._vectors = torch.cat([old, vectors.new_zeros(len(items) - len(old), vectors.shape[1])])
            rows = [numbers[item.id] - first for item in changed]
            self._vectors[torch.tensor(rows, device=vectors.device)] = vectors
            experiment.hllm.item_source = JoinedItems(self._source, first, self._vectors)
        if self._base_vectors is not None:
            experiment.item_vectors = np.pad(self._base_vectors, ((0, len(items)), (0, 0)))
        if self._base_evidence is not None:
            text = None if self._vectors is None else self._vectors.float().cpu().numpy()
            experiment.evidence = self._base_evidence.with_new_items(text)
        experiment.dataset = DatasetWithNewItems(self._base, list(items.values()))
        self._items, self._numbers = items, numbers

    def _encoded(self, new: DatasetWithNewItems) -> Tensor | None:
        """Embeddings [n, E] of the new items of `new`; None in an ID-only model. Collective."""
        experiment, live = self._experiment, self._experiment.live_items
        if experiment.item_encoder is None:
            return None
        assert live is not None
        section = experiment.config.item_llm
        texts = new.new_text(section.text_keys)
        tokens = _tokens_of(texts, self._tokenizer, experiment.item_encoder.tokens.facts)
        encoder = ItemEncoder(tokens, experiment.device, False, section.items_at_once)
        embed = partial(experiment.hllm.embed_items, source=LiveItems(live.item_llm, encoder))
        vectors = encoder.encode_catalogue(live.item_llm, embed, show=False)
        if isinstance(self._source, StoredItems) and self._source.adapter is not None:
            vectors = self._source.adapter(vectors)
        return vectors

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        section = self._experiment.config.item_llm
        return read_tokenizer(Path(str(section.tokenizer or section.pretrained)))


def _tokens_of(texts: pa.Table, tokenizer: "PreTrainedTokenizerBase", facts: dict[str, Any]) -> TokenStore:
    """In-memory token store of text columns [n], with the settings of the token store that has `facts`."""
    rows: list[list[int]] = []
    for some in laid_out_texts(texts, facts["prompt"], facts["keys"], facts["separator"]):
        rows += tokenize(tokenizer, some, facts["max_text_length"], facts.get("keep_end", False))
    values = np.array([token for row in rows for token in row], np.int32)
    return TokenStore(Path("new items"), values, offsets_from_lengths([len(row) for row in rows]), facts)
