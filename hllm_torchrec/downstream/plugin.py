"""Stored item and user vectors in an existing TorchRec DLRM, without changes to its batch class, loss and pipeline.

    items = VectorLookup("stores/items")                                  # in the data loader
    dense = append_vectors(dense, items(raw_item_ids))                    # [B, n] -> [B, n + E + 1]
    model = plug_into(DLRM, tables, n, [items.width], "slots", ...)       # instead of DLRM(tables, n, ...)
    VectorLookup("stores/items", items.identity)                          # where the model is served

The vectors are columns of `dense_features`, so `DLRMTrain` and `TrainPipelineSparseDist` need no change. The model
splits these columns off, normalizes the vectors, and either appends them to the dense features ("dense") or projects
them to the tables' width as additional slots of the interaction ("slots"). Missing ids get a learned default. A custom
model uses the columns through `StoredVectors` (docs/tutorials/dlrm_plugin.md).

Legend: B rows, n dense features, E width of a stored vector, O outputs of several tasks.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM, SparseArch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.downstream.dlrm_config import VectorPlacement
from hllm_torchrec.modules.features.sum_pooling import SumPooledCollection
from hllm_torchrec.store.keys import Keys
from hllm_torchrec.store.store import EmbeddingStore


class VectorLookup:
    """Looks up ids in a committed state of a store, and counts missing ids.

    Args:
        path: folder or URL of the store.
        identity: `identity` of the lookup with which a model was trained, saved with its weights; None: any store is
            accepted.

    Raises:
        ValueError: the store does not exist, or has the vectors of another model.
    """

    def __init__(self, path: str | Path, identity: str | None = None) -> None:
        self._path = path
        self.store = EmbeddingStore.open(path)
        if identity is not None:
            self._require(self.store, identity)
        self.identity = self.store.identity_hash
        """Hash of the facts of the model that made the vectors, their width and the type of keys; the same for all
        versions of a store.
        """
        self._snapshot = self.store.snapshot()
        self.width = self.store.width
        self.num_requested = self.num_unknown = 0

    def refresh(self) -> bool:
        """Switch to the store's current state; returns True if it has changed. Other threads may look up ids meanwhile.

        Raises:
            ValueError: the path now has the vectors of another model; lookups then continue to use the old state.
        """
        store = EmbeddingStore.open(self._path)
        self._require(store, self.identity)
        before, self.store, self._snapshot = self._snapshot.version, store, store.snapshot()
        return self._snapshot.version != before

    def _require(self, store: EmbeddingStore, identity: str) -> None:
        if store.identity_hash != identity:
            raise ValueError(
                f"{self._path}: its vectors were made by another model ({store.identity_hash}) than the expected one "
                f"({identity}): give the store of the expected model, or train the DLRM on these vectors"
            )

    def __call__(self, ids: Keys) -> Tensor:
        """Raw ids [B] -> float32 [B, E + 1]: vectors (zeros if unknown); the last column is 1 if unknown, else 0.

        ids: texts or numbers, like the keys of the store; numbers may be in an array, a tensor or a list.
        """
        vectors, known = self._snapshot.gather(ids)
        self.num_requested += known.numel()
        self.num_unknown += int((~known).sum())
        return torch.cat([vectors, (~known)[:, None].float()], dim=1)

    @property
    def unknown_share(self) -> float:
        """Share of the ids requested so far that are not in the store."""
        return self.num_unknown / max(self.num_requested, 1)


def append_vectors(dense_features: Tensor, *found: Tensor) -> Tensor:
    """Concatenate dense features [B, n] and the results of lookups, each [B, E + 1]."""
    return torch.cat([dense_features, *found], dim=1)


class StoredVectors(nn.Module):
    """Input layer for the vectors of one store: layer norm, optional projection, learned default for missing vectors.

    Args:
        width: E.
        out: output width; None: E, without a projection.
        dropout: dropout probability of the normalized vector's entries. A user's vector nearly identifies the user, so
            without dropout a DLRM can memorize its training users.
    """

    def __init__(self, width: int, out: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Identity() if out is None else nn.Linear(width, out)
        self.default = nn.Parameter(torch.zeros(out or width))

    def forward(self, found: Tensor) -> Tensor:
        """Map the result [B, E + 1] of `VectorLookup` to [B, out]."""
        return torch.where(found[:, -1:] > 0, self.default, self.project(self.dropout(self.norm(found[:, :-1]))))


class PluggedDLRM(nn.Module):
    """A DLRM, DLRM_DCN or DLRM_Projection with stored vectors and the same call signature. Created by `plug_into`.

    Args:
        dlrm: model whose layer sizes include the vectors.
        dense: n, number of dense features before the vectors.
        widths: E of each store, in the order of the columns.
        dropout: see `StoredVectors`.
    """

    def __init__(self, dlrm: DLRM, dense: int, widths: list[int], way: VectorPlacement, dropout: float = 0.0) -> None:
        super().__init__()
        self.dlrm, self.dense, self.way = dlrm, dense, way
        out = dlrm.sparse_arch.D if way == "slots" else None
        self.stored = nn.ModuleList(StoredVectors(width, out, dropout) for width in widths)
        # Each store has width + 1 columns: the vector, and the flag of a missing vector.
        ends = np.cumsum([dense, *(width + 1 for width in widths)]).tolist()
        self.columns = [slice(first, end) for first, end in zip(ends, ends[1:])]

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Map dense_features [B, n + sum of (E + 1)] to logits [B, 1] (or outputs [B, O] of several tasks)."""
        features = dense_features[:, : self.dense]
        vectors = [module(dense_features[:, cut]) for module, cut in zip(self.stored, self.columns)]
        embedded = self.dlrm.sparse_arch(sparse_features)
        if self.way == "dense":
            dense = self.dlrm.dense_arch(torch.cat([features, *vectors], dim=1))
        else:
            dense = self.dlrm.dense_arch(features)
            embedded = torch.cat([embedded, torch.stack(vectors, dim=1)], dim=1)
        logits: Tensor = self.dlrm.over_arch(self.dlrm.inter_arch(dense_features=dense, sparse_features=embedded))
        return logits


def plug_into(
    kind: type[DLRM],
    tables: EmbeddingBagCollection | EmbeddingCollection,
    dense_in_features: int,
    widths: list[int],
    way: VectorPlacement,
    dropout: float = 0.0,
    **options: Any,
) -> PluggedDLRM:
    """Build a model of `kind` that also uses stored vectors.

    Args:
        kind: DLRM, DLRM_DCN or DLRM_Projection.
        tables, dense_in_features, options: arguments of `kind` without stored vectors; the tables may also be an
            `EmbeddingCollection`, whose rows are then summed for each feature.
        widths: E of each store, in the order of `append_vectors`.
        way: "dense": the vectors are dense features; "slots": they are slots of the interaction, one per store.
        dropout: see `StoredVectors`.

    Raises:
        ValueError: `widths` is empty, or `way` is unknown.
    """
    if not widths or way not in ("dense", "slots"):
        raise ValueError(f"plug_into: widths={widths}, way={way!r}: give the width of each store, and dense or slots")
    if isinstance(tables, EmbeddingCollection):
        tables = SumPooledCollection(tables)
    if way == "dense":
        return PluggedDLRM(
            kind(tables, dense_in_features + sum(widths), **options), dense_in_features, widths, way, dropout
        )
    # Each kind computes the size of its interaction from the tables' features. So pass a collection with one
    # placeholder table per store (on the meta device, never allocated), and replace it by the real collection
    # afterwards.
    configs = tables.embedding_bag_configs()
    placeholders = [
        EmbeddingBagConfig(name=name, embedding_dim=configs[0].embedding_dim, num_embeddings=1, feature_names=[name])
        for name in (f"stored_{number}" for number in range(len(widths)))
    ]
    sized = EmbeddingBagCollection([*configs, *placeholders], device=torch.device("meta"))
    dlrm = kind(sized, dense_in_features, **options)
    dlrm.sparse_arch = SparseArch(tables)
    return PluggedDLRM(dlrm, dense_in_features, widths, way, dropout)
