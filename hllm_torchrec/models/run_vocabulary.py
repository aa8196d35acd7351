"""Check of a run's ids against a dataset: each id map that indexes the run's weights must be a prefix of the dataset's.

The marks of the maps (`data/vocabulary.py`) are saved in each checkpoint. Checkpoints of an earlier version have no
marks; `hllm adopt` writes them to `vocabulary.json` in the run directory.
"""

import json
import logging
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.checkpoint.growth import MODEL
from hllm_torchrec.checkpoint.layout import read_checkpoint_json
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.checkpoint.state import is_under
from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_schema import CONTEXT
from hllm_torchrec.data.item_factors import FACTORS, item_vectors, number_of_vectors
from hllm_torchrec.data.vocabulary import IdMark, dataset_marks, find_difference, map_problems, row_digests, vector_mark
from hllm_torchrec.distributed import coordination
from hllm_torchrec.modules.features.hybrid import ACTION_GATE

VOCABULARY = "vocabulary"
"""Key of the marks in a checkpoint's `extra.json`."""
FACTORS_KEY = "factors"
"""Key of the fingerprint of the run's item factors in a checkpoint's `extra.json`."""
ADOPTED = "vocabulary.json"
"""File in a run directory with the marks, if the run's checkpoints have none."""
TABLES = "features.tables.embedding_bags."
"""Prefix of the name of a table's weight, followed by the table's name."""
VECTORS = "vectors/"
_logger = logging.getLogger(__name__)


def maps_read(config: Config) -> dict[str, list[str]]:
    """Id map -> prefixes of the names of the weights that are indexed by its numbers.

    The result is empty for a model without IDs and features, whose weights fit any dataset.
    """
    features, data = config.features, config.data
    gates = [ACTION_GATE] if features.action_gate else []
    actions = [*(["action"] if features.action else []), *gates]
    found = {"items": [f"{TABLES}item_id"]} if features.item_id else {}
    found |= {"actions": [TABLES + name for name in actions]} if actions else {}
    found |= {f"feature/{name}": [TABLES + name] for name in (*data.item_features, *data.user_features)}
    found |= {f"feature/{name}": [f"{TABLES}{CONTEXT}{name}"] for name in data.context}
    biased = config.objective.position_bias
    found |= {f"feature/{name}": [f"position_bias.embedding_bags.bias_{name}"] for name in biased}
    return found | {f"{VECTORS}{name}": ["project_vectors"] for name in data.item_vectors if name != FACTORS}


def experiment_marks(config: Config, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Marks (JSON) of all maps of a dataset, and of the files of item vectors in a configuration. Collective."""

    def compute() -> dict[str, dict[str, Any]]:
        marks = dataset_marks(dataset)
        names = [name for name in config.data.item_vectors if name != FACTORS]
        marks |= {f"{VECTORS}{name}": vector_mark(*_own_vectors(dataset, name)) for name in names}
        return {name: mark.to_json() for name, mark in marks.items()}

    return coordination.run_on_rank_zero(compute)


def saved_marks(checkpoint: Path) -> dict[str, IdMark] | None:
    """Marks of the maps that a checkpoint's model was trained with, from the checkpoint or else the run, or None.

    Raises:
        ValueError: the marks are damaged.
    """
    marks = read_checkpoint_json(checkpoint / "extra.json").get(VOCABULARY)
    adopted = checkpoint.parent.parent / ADOPTED
    if marks is None and adopted.is_file():
        marks = json.loads(adopted.read_text(encoding="utf-8"))
    if marks is None:
        return None
    if not isinstance(marks, Mapping):
        raise ValueError(f"{checkpoint}: its vocabulary is a {type(marks).__name__}; load another checkpoint")
    try:
        return {str(name): IdMark.from_json(mark) for name, mark in marks.items()}
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}; load another checkpoint") from error


def write_adopted(run: Path, marks: Mapping[str, IdMark]) -> Path:
    """Write the marks of a run whose checkpoints have none; returns the file's path."""
    replace_file(run / ADOPTED, json.dumps({name: mark.to_json() for name, mark in marks.items()}))
    return run / ADOPTED


def check_vocabulary(
    config: Config, dataset: Dataset, checkpoint: Path, skip: Collection[str] = (), also: Collection[str] = ()
) -> None:
    """Check the maps of a checkpoint against a dataset. Collective.

    A checkpoint without marks is accepted with a warning.

    Args:
        config: configuration of the model into which the checkpoint is loaded.
        skip: prefixes of weights that are not loaded; their maps are not compared.
        also: maps to compare although they do not index weights.

    Raises:
        ValueError: a map of the checkpoint is not a prefix of the dataset's map; the message has the first difference.
    """

    def compare() -> list[str]:
        keys = [key.removeprefix(f"{MODEL}.") for key in SafeReader(checkpoint).read_tensors()]
        loaded = [key for key in keys if not is_under(key, skip)]
        read = maps_read(config).items()
        names = [name for name, weights in read if any(is_under(key, weights) for key in loaded)]
        return _problems(dataset, checkpoint, [*names, *(name for name in also if name not in names)])

    problems = coordination.run_on_rank_zero(compare)
    if problems:
        raise ValueError(
            f"{checkpoint} was trained with other ids than those of {dataset.root}: {'; '.join(problems)}. Name the "
            "run's dataset or a later version of it (--dataset, data.dataset), or train anew"
        )


def _problems(dataset: Dataset, checkpoint: Path, names: list[str]) -> list[str]:
    if not names:
        return []
    marks = saved_marks(checkpoint)
    if marks is None:
        _logger.warning(
            "%s does not say which ids it was trained with (an earlier version saved it): the ids of %s are assumed; "
            "`hllm adopt --run RUN --dataset DIR` records them",
            checkpoint,
            dataset.root,
        )
        return []
    problems = map_problems(marks, dataset, [name for name in names if not name.startswith(VECTORS)])
    for name in names:
        if name.startswith(VECTORS) and name in marks:
            problems += _vector_problems(name, marks[name], dataset)
    return problems


def _vector_problems(name: str, run: IdMark, dataset: Dataset) -> list[str]:
    vectors, erased = _own_vectors(dataset, name.removeprefix(VECTORS))
    found = find_difference(run, vector_mark(vectors, erased), partial(row_digests, vectors, erased=erased))
    return [] if found is None else [f"{name}: rows {found.first} to {found.last - 1} differ in this dataset"]


def _own_vectors(dataset: Dataset, name: str) -> tuple[NDArray[np.float32], dict[int, bytes]]:
    """(rows of a file of item vectors, row -> digest of the erased rows)."""
    rows = item_vectors(dataset, name)[: number_of_vectors(dataset, name)]
    return rows, dataset.tombstones.digests(f"{VECTORS}{name}")
