"""Forgetting of users in clusters, and of items in titles: what `hllm forget` does with the folders of both.

A user's assignment goes. The center of the cluster stays until the next fit (`hllm cluster --refit`): it is the mean of
at least `least` users. A center that is a forgotten user's own vector (a medoid) is reported as left: only a fit
replaces it and the titles that were written from it. An item's titles go.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.atomic_files import remove_folder
from hllm_torchrec.common.locks import hold_lock
from hllm_torchrec.creative.clusters import SCHEMA, Clusters, write_clusters
from hllm_torchrec.creative.titles import commit, committed, read_facts


def forget_users(path: Path, users: Collection[str], dry_run: bool = False) -> tuple[int, str]:
    """Remove users from clusters; returns how many were there, and what is left to do ("": nothing).

    Raises:
        ValueError: the clusters are damaged.
    """
    clusters = Clusters.open(path)
    table = pa.table(list(clusters.users.values()), schema=SCHEMA)
    gone = pc.is_in(table["raw_user_id"], value_set=pa.array(list(users), pa.large_string()))
    found = pc.sum(gone).as_py() or 0
    if found and not dry_run:
        kept = np.flatnonzero(~gone.to_numpy(zero_copy_only=False))
        facts = {name: value for name, value in clusters.facts.items() if name not in ("sizes", "files")}
        write_clusters(path, facts, clusters.centers, table.take(pa.array(kept)), clusters.hashes[kept])
    medoids = sum(one in users for one in clusters.facts.get("medoids", []))
    left = f"{medoids} centers are vectors of forgotten users: fit again (hllm cluster --refit), then hllm create"
    return found, left if medoids else ""


def forget_items(path: Path, items: Collection[str], dry_run: bool = False) -> int:
    """Remove the titles of items, and titles that are not committed; returns how many titles were there.

    Raises:
        ValueError: the titles are damaged, or a job is writing there.
    """
    titles = committed(path)
    gone = pc.is_in(titles["raw_item_id"], value_set=pa.array(list(items), pa.large_string()))
    found: int = pc.sum(gone).as_py() or 0
    if dry_run:
        return found
    with hold_lock(path / "lock", f"{path}: a job is writing titles"):
        if found:
            facts = {name: value for name, value in read_facts(path).items() if name != "files"}
            kept = titles.filter(pc.invert(gone))
            commit(path, kept, facts | {"titles": len(kept), "fallbacks": pc.sum(kept["fallback"]).as_py() or 0})
        elif items:  # rounds name no items: whose titles they are is known to the job alone
            remove_folder(path / "rounds")
            (path / "rounds").mkdir()
    return found
