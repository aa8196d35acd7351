"""ID and timestamp features, sum-pooled with the item embedding before the User LLM (HLLM, appendix A).

    x_i = P(E_i) + ID_i + action_i + ... + MLP([year_i, ..., second_i]) + W n_i        (Table 12, Algorithm 1)

With an action gate g (not in the paper), the action also scales the item's vector: a film rated 1 is evidence against
similar films, which a sum cannot express.

    x_i = (P(E_i) + ID_i) * (1 + g(action_i)) + action_i + MLP(...) + W n_i

Tables are in one TorchRec `EmbeddingBagCollection`; those of open vocabularies (`hash_tables`) are in a separate
collection. TorchRec shards both. The jagged features have one bag per *slot*. The slots are the history positions, then
the query tokens, then the target items (late fusion only), then the unique items (only if the generative loss compares
items in the space of features). A bag may be empty (adds zero) or have several values (the vectors of an item's genres
are summed).

Legend: S slots, D width of the user encoder, F numeric features.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.modules.features.hash_tables import HashTable, hash_collection
from hllm_torchrec.modules.features.sum_pooling import SumPooledCollection
from hllm_torchrec.modules.features.timestamps import TABLE_SIZES, TIME_FEATURES, TimestampMLP

ACTION_GATE = "action_gate"
"""Name of the gate's feature and table; its bags at history positions are those of `action`, all others are empty."""


def table_config(name: str, rows: int, width: int, scale: float = 0.02, *, half: bool = False) -> EmbeddingBagConfig:
    """Configuration of a sum-pooled table with a feature of the same name.

    Entries are initialized uniformly in +-scale; half: store them in float16.
    """
    return EmbeddingBagConfig(
        name=name,
        embedding_dim=width,
        num_embeddings=rows,
        feature_names=[name],
        pooling=PoolingType.SUM,
        weight_init_min=-scale,
        weight_init_max=scale,
        data_type=DataType.FP16 if half else DataType.FP32,
    )


class HybridFeatures(nn.Module):
    """Sum over tables, merged time and numeric features, for every slot.

    Args:
        tables: {feature: number of rows}; each has width D, and their vectors are summed.
        width: D.
        time_depth: number of time components that are used, from year to second (0: none).
        time_width: width of the tables of time components.
        numeric: number F of numeric inputs (0: none), through one linear layer without bias.
        item_features: the features in `tables` that describe the slot's item; the gate multiplies them, too.
        gate_rows: number of actions of the gate (0: no gate).
        scale: table entries are initialized uniformly in +-scale.
        half_from_rows: tables of at least this many rows, except those of `hash_tables`, are in float16 (the sums are
            float32); None: no table is.
        hash_tables: {feature: settings} of the features in `tables` with an open vocabulary; `tables`' number of rows
            is ignored for them.
        device: of the tables ("meta" before sharding).
    """

    def __init__(
        self,
        tables: dict[str, int],
        width: int,
        *,
        time_depth: int = 6,
        time_width: int = 32,
        numeric: int = 0,
        item_features: Collection[str] = (),
        gate_rows: int = 0,
        scale: float = 0.02,
        half_from_rows: int | None = None,
        hash_tables: Mapping[str, HashTable] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.item_features: Sequence[str] = tuple(name for name in tables if name in item_features)
        self.event_features: Sequence[str] = tuple(name for name in tables if name not in item_features)
        self.gated = gate_rows > 0
        self.history_actions: tuple[str | None, int] = (None, 1)
        """(Feature that holds the action of each history position, number of actions); (None, 1): none does."""
        for name, rows in (("action", tables.get("action", 0)), (ACTION_GATE, gate_rows)):
            if rows:
                self.history_actions = name, rows
        self.time_features: Sequence[str] = TIME_FEATURES[:time_depth]
        self.hash_tables = dict(hash_tables or {})
        sizes = [(name, rows, width) for name, rows in tables.items() if name not in self.hash_tables]
        if self.gated:
            sizes.append((ACTION_GATE, gate_rows, width))
        times = zip(self.time_features, TABLE_SIZES[:time_depth], strict=True)
        sizes += [(name, rows, time_width) for name, rows in times]
        configs = [
            table_config(name, rows, columns, scale, half=half_from_rows is not None and rows >= half_from_rows)
            for name, rows, columns in sizes
        ]
        self.tables = EmbeddingBagCollection(tables=configs, device=device) if configs else None
        self.hashed: SumPooledCollection | None = None
        if self.hash_tables:
            self.hashed = SumPooledCollection(hash_collection(self.hash_tables, width, scale, device))
        self.merge_time = TimestampMLP(time_width, width, time_depth) if time_depth else None
        self.numeric = nn.Linear(numeric, width, bias=False) if numeric else None

    def forward(self, features: KeyedJaggedTensor, numeric: Tensor | None, items: Tensor | None = None) -> Tensor:
        """Compute the sum of all features for every slot.

        Args:
            features: S bags per key.
            numeric: [S, F] float32, or None.
            items: [S, D] projected item embeddings of the slots' items, zeros where a slot has none; or None.

        Returns:
            [S, D].
        """
        slots = features.stride()
        # Computed before padding, because a rank without slots must return [0, D].
        zeros = torch.zeros(slots, self.width, device=features.device())
        features = pad_empty_batch(features)
        pooled = {} if self.tables is None else self.tables(features).to_dict()
        if self.hashed is not None:
            pooled |= self.hashed(features).to_dict()
        pooled = {name: rows[:slots].float() for name, rows in pooled.items()}
        # Item features and the item's embedding are summed first, as the gate scales them together.
        described = _sum([pooled[name] for name in self.item_features] + ([] if items is None else [items]), zeros)
        if self.gated:
            described = described * (1 + pooled[ACTION_GATE])
        terms = [described, *(pooled[name] for name in self.event_features)]
        if self.merge_time is not None:
            # Late fusion's targets have no time, so their bags are empty. Without this factor the MLP's output for zero
            # inputs, which comes from its biases, would be added to them.
            merged = self.merge_time(torch.cat([pooled[name] for name in self.time_features], dim=-1))
            has_time = features[self.time_features[0]].lengths()[:slots] > 0
            terms.append(merged * has_time[:, None])
        if self.numeric is not None and numeric is not None:
            terms.append(self.numeric(numeric))
        return _sum(terms, zeros)


def pad_empty_batch(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Pad an empty batch to one empty bag per key; return any other batch as it is.

    TorchRec cannot handle a batch of zero bags, but every rank must take part in its collectives.
    """
    if features.stride():
        return features
    keys = features.keys()
    lengths = torch.zeros(len(keys), dtype=torch.int64, device=features.device())
    return KeyedJaggedTensor(keys=keys, values=features.values(), lengths=lengths, stride=1)


def _sum(terms: Sequence[Tensor], zeros: Tensor) -> Tensor:
    """Sum the terms; `zeros` if there are none."""
    total = terms[0] if terms else zeros
    for term in terms[1:]:
        total = total + term
    return total
