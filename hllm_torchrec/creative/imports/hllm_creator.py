"""Reader of HLLM-Creator's training tables (Parquet). A row has a user's history, an item and a personalized title.

    item_id_list, title_list    the history, oldest first: lists, or JSON text of lists
    original_title, original_description, response, user_profile

The prompts in these tables (prompt1, prompt2) are not read, because a run has its own prompt (`creative.prompt`). The
tables have no id of the item, so its id is a hash of its texts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hllm_torchrec.common.hashing import hash_texts
from hllm_torchrec.creative.imports.samples import Item, Sample, text_of
from hllm_torchrec.data.validation import error_location

COLUMNS = ("item_id_list", "title_list", "original_title", "response")
OPTIONAL = ("original_description", "user_profile")
_REMEDY = "give Parquet files in the format of HLLM-Creator's training table"


def read_hllm_creator(paths: Sequence[Path]) -> Iterator[Sample]:
    """Yield a sample for each row of the files, in their order.

    Raises:
        ValueError: a file is damaged or has other columns, or the lists of a row differ in length.
    """
    for path in paths:
        row = 0
        with error_location(path, _REMEDY), pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in COLUMNS if name not in names]:
                raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(names)}; {_REMEDY}")
            wanted = [*COLUMNS, *(name for name in OPTIONAL if name in names)]
            for batch in file.iter_batches(1024, columns=wanted):
                batch.validate(full=True)
                for values in batch.to_pylist():
                    yield _sample(values, f"{path}, row {row}")
                    row += 1


def _sample(values: Mapping[str, Any], where: str) -> Sample:
    ids, titles = (_list(values[name], f"{where}, {name}") for name in ("item_id_list", "title_list"))
    if len(ids) != len(titles):
        raise ValueError(
            f"{where}: item_id_list has {len(ids)} entries, title_list {len(titles)}: they must have the same number"
        )
    title, description = text_of(values["original_title"]), text_of(values.get("original_description"))
    return Sample(
        history=tuple(Item(one, text) for one, text in zip(ids, titles, strict=True)),
        item=Item(f"t-{hash_texts([title, description])[:20]}", title, description),
        response=text_of(values["response"]),
        profile=text_of(values.get("user_profile")) or None,
    )


def _list(value: Any, where: str) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or any(isinstance(one, list | dict) for one in value):
        raise ValueError(f"{where}: must be a list of ids or titles")
    return [text_of(one) for one in value]
