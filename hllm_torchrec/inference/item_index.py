"""FAISS index of a run's item vectors for serving retrieval: maps user vectors to item ids.

    export_item_index(Path("runs/retrieval/hstu"), Path("exports/items"), "best", device)     # or: hllm index ...
    index = ItemIndex.open(Path("exports/items"))
    ids, scores = index.search(vectors, 100, exclude=seen)

Item vectors are in the space of the generative loss, like the user vectors of a model without late fusion
(`HLLM.embed_users`, `hllm embed --users`). The folder has the same layout as that of `hllm store export --faiss`, which
`ItemIndex.open` can also read. The vectors have norm 1, so scores are cosines. faiss is an optional dependency:
pip install "hllm_torchrec[faiss]".

Legend: N items, B users, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from hllm_torchrec.common.arrays import Floats
from hllm_torchrec.data.validation import error_location, read_table
from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.inference.new_items import NewItems
from hllm_torchrec.store.export_formats import import_faiss, write_index

Kind = Literal["flat", "ivf"]


@dataclass(frozen=True)
class ItemIndex:
    """FAISS index of inner products. ids: [N], id (text or number) of the item at each position of the index."""

    index: Any
    ids: pa.Array

    @classmethod
    def build(
        cls,
        vectors: Floats,
        ids: Sequence[Any] | pa.Array,
        kind: Kind = "flat",
        cells: int = 0,
        points_of_cell: int = 256,
    ) -> "ItemIndex":
        """Build an index of vectors [N, D], which are normalized.

        kind: "flat" is exact and scores all items; "ivf" clusters items into `cells` cells (0: 4 sqrt(N) cells) and
            scores only the items of the cells nearest to the user, `nprobe` cells (see `search`). points_of_cell:
            number of items per cell in the sample from which the cells are computed.

        Raises:
            ValueError: faiss is not installed, the numbers of ids and vectors differ, or there are more cells than
                items.
        """
        faiss = import_faiss()
        vectors = normalize_rows(vectors)
        if len(ids) != len(vectors):
            raise ValueError(f"{len(ids)} ids for {len(vectors)} vectors: give one to each")
        index = faiss.IndexFlatIP(vectors.shape[1])
        if kind == "ivf":
            cells = cells or max(1, min(len(vectors), round(4 * len(vectors) ** 0.5)))
            if not 1 <= cells <= len(vectors):
                raise ValueError(f"cells is {cells}: must be 1 to {len(vectors)}, the number of items")
            index = faiss.IndexIVFFlat(index, vectors.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
            index.cp.min_points_per_centroid = 1  # otherwise FAISS warns about small catalogues
            index.cp.max_points_per_centroid = points_of_cell
            index.train(vectors)
        index.add(vectors)
        return cls(index, ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids))

    @classmethod
    def open(cls, folder: Path) -> "ItemIndex":
        """Open an index written by `save` or `hllm store export --faiss`.

        Raises:
            ValueError: faiss is not installed, or the folder has no index.
        """
        faiss, file = import_faiss(), folder / "index.faiss"
        if not file.is_file():
            raise ValueError(f"{folder}: no index.faiss: write one with `hllm index` or `hllm store export --faiss`")
        with error_location(folder, "write the index again"):
            return cls(faiss.read_index(str(file)), read_table(folder / "ids.parquet", ["id"])["id"].combine_chunks())

    def save(self, folder: Path) -> None:
        """Write index.faiss and ids.parquet.

        Raises:
            ValueError: `folder` exists.
        """
        write_index(self.index, self.ids, folder)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(
        self, users: Floats, k: int, exclude: Sequence[Sequence[Any]] | None = None, nprobe: int = 16
    ) -> tuple[list[list[Any]], Floats]:
        """Return the best items of each user, best first, without those in `exclude`.

        Args:
            users: [B, D]; the vectors are normalized here.
            k: number of items per user, at least 1.
            exclude: ids to leave out, per user, such as seen items; unknown ids are ignored.
            nprobe: number of cells searched in an ivf index.

        Returns:
            B lists of at most k ids (fewer if no more items are left or found in the searched cells), and scores
            [B, k] float32, -inf after the last id.

        Raises:
            ValueError: k is below 1, the width of `users` is wrong, or the length of `exclude` is not B.
        """
        users = self._checked(users, k, exclude)
        out = [frozenset(ids) for ids in exclude] if exclude is not None else [frozenset()] * len(users)
        # Excluded items can occupy the first ranks, so search for more items, by the length of the longest list.
        wanted = min(k + max(map(len, out), default=0), len(self))
        found, positions = self.index.search(users, max(wanted, 1), params=self._parameters(nprobe))
        scores, ids = np.full((len(users), k), -np.inf, np.float32), []
        known = self.ids.take(pa.array(np.maximum(positions, 0).reshape(-1))).to_pylist()
        # FAISS returns position -1 where it has found fewer items than requested.
        for row, banned in enumerate(out):
            row_ids = known[row * positions.shape[1] : (row + 1) * positions.shape[1]]
            kept = [at for at, found_at in enumerate(positions[row]) if found_at >= 0 and row_ids[at] not in banned][:k]
            scores[row, : len(kept)] = found[row, kept]
            ids.append([row_ids[at] for at in kept])
        return ids, scores

    def _checked(self, users: Floats, k: int, exclude: Sequence[Sequence[Any]] | None) -> Floats:
        if k < 1:
            raise ValueError(f"k is {k}: must be at least 1")
        if users.ndim != 2 or users.shape[1] != self.index.d:
            raise ValueError(f"users: shape {users.shape}: must be [B, {self.index.d}], the width of the items")
        if exclude is not None and len(exclude) != len(users):
            raise ValueError(f"exclude: {len(exclude)} lists for {len(users)} users: give one to each")
        return normalize_rows(users)

    def _parameters(self, nprobe: int) -> Any:
        faiss = import_faiss()
        return faiss.SearchParametersIVF(nprobe=nprobe) if isinstance(self.index, faiss.IndexIVF) else None


def normalize_rows(vectors: Floats) -> Floats:
    """Copy [n, D] with rows normalized to length 1 by `torch.nn.functional.normalize`."""
    return torch.nn.functional.normalize(torch.from_numpy(np.asarray(vectors, np.float32)), dim=-1).numpy().copy()


def export_item_index(
    run: Path,
    target: Path,
    which: str,
    device: torch.device,
    kind: Kind = "flat",
    cells: int = 0,
    *,
    dataset: Path | None = None,
) -> int:
    """Write the index of a run's items at a checkpoint ("best", "latest" or a directory), by raw id. Collective.

    The index has the candidate items of the dataset and the new items of its journal (`inference.new_items`).

    Returns:
        Number of items.

    Raises:
        ValueError: see `load_run` and `ItemIndex`; or users and items of the model do not share a vector space.
    """
    loaded = load_run(run, which, device, dataset=dataset)
    experiment = loaded.experiment
    if not experiment.hllm.generates:
        raise ValueError(
            f"{run}: objective.generative_weight: 0: users and items share no space; train with a generative loss"
        )
    with loaded.weights, experiment.evaluation_items():
        NewItems(experiment)
        vectors = catalogue_vectors(experiment).cpu().float().numpy()
    items = np.setdiff1d(np.arange(1, len(vectors)), experiment.dataset.excluded_items)
    ids = experiment.dataset.items["raw_item_id"].combine_chunks().take(pa.array(items - 1))
    run_on_rank_zero(lambda: ItemIndex.build(vectors[items], ids, kind, cells).save(target))
    return len(ids)
