"""`hllm adopt`: records the id maps of a run that was trained by an earlier version of this library."""

from pathlib import Path

from hllm_torchrec.checkpoint.growth import saved_table_rows
from hllm_torchrec.checkpoint.load import latest_checkpoint
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.item_factors import item_vectors
from hllm_torchrec.data.vocabulary import IdMark, dataset_marks, map_ids, mark_ids, row_digests
from hllm_torchrec.evaluation.run_loader import run_config
from hllm_torchrec.models.run_vocabulary import TABLES, VECTORS, maps_read, saved_marks, write_adopted


def adopt(run: Path, dataset: Path) -> dict[str, IdMark]:
    """Write the marks of a dataset's id maps into a run that has no marks, and return them.

    The dataset may have grown since the training: the marks are those of the dataset's first ids, as many as the run's
    tables have. It cannot be checked that these are the run's ids, because the run has no record of its ids.

    Raises:
        ValueError: the run has no checkpoint, already has marks, or has more ids than the dataset.
    """
    config = run_config(run, dataset)
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{run / 'checkpoints'} has no complete checkpoint; train first")
    if saved_marks(checkpoint) is not None:
        raise ValueError(f"{run} knows its ids already; nothing to adopt")
    opened = Dataset.open(dataset)
    rows, complete, marks = saved_table_rows(SafeReader(checkpoint).read_tensors()), dataset_marks(opened), {}
    for name, weights in maps_read(config).items():
        if name.startswith(VECTORS):
            vectors = item_vectors(opened, name.removeprefix(VECTORS))
            marks[name] = mark_ids(row_digests(vectors, 0, rows.get("item_id")))
            continue
        known = rows[weights[0].removeprefix(TABLES)] - 1  # row 0 is that of the unknown id
        if known > complete[name].count:
            raise ValueError(
                f"{run} was not trained on {dataset}: {name}: {known} in the run, {complete[name].count} in the "
                "dataset; name the run's dataset"
            )
        marks[name] = mark_ids(map_ids(opened, name, 0, known))
    write_adopted(run, marks)
    return marks
