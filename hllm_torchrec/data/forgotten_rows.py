"""Filter that leaves out, and counts, the rows of a source that contain a forgotten id."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa

from hllm_torchrec.data.bad_rows import BadRowLog
from hllm_torchrec.data.sources.base import Chunk, Source
from hllm_torchrec.data.tombstones import ITEMS, USERS, Tombstones


def without_forgotten(source: Source, forgotten: Tombstones, log: BadRowLog) -> Source:
    """The source without the forgotten users' and items' events and rows.

    log: counts the rows as `forgotten_user` and `forgotten_item`.
    """
    if not forgotten:
        return source

    def filtered(read: Callable[[], Iterator[Chunk]], columns: dict[str, str]) -> Callable[[], Iterator[Chunk]]:
        def chunks() -> Iterator[Chunk]:
            for chunk in read():
                table = chunk.table
                for column, name in columns.items():
                    gone = forgotten.mask(name, table[column].cast(pa.string()))
                    if gone.any():
                        log.dropped[f"forgotten_{name.removesuffix('s')}"] += int(np.count_nonzero(gone))
                        table = table.filter(pa.array(~gone))
                yield replace(chunk, table=table)

        return chunks

    user, item = {"raw_user_id": USERS}, {"raw_item_id": ITEMS}
    return replace(
        source,
        events=filtered(source.events, user | item),
        items=filtered(source.items, item),
        users=filtered(source.users, user),
    )
