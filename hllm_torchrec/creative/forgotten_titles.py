"""`hllm forget` in clusters of users and in titles of items.

The assignment of a forgotten user is removed. The center of the user's cluster stays until the next fit (`hllm cluster
--refit`), because it is a mean over users (at least `least`, unless the store had fewer). If the center is the vector
of a forgotten user (a medoid), only a new fit can replace it, and `forget_users` says so. The titles of a forgotten
item are removed.
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
    """Remove the assignments of users, given by raw ids.

    Returns:
        The number of given users who are in a cluster, and a message about what the operator still has to do ("":
        nothing).

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
    """Remove the titles of items, given by raw ids, and all titles that have not been committed yet.

    Returns:
        The number of committed titles of the items.

    Raises:
        ValueError: the titles are damaged, or a job is writing to the folder.
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
        elif items:  # rounds contain no item ids, so all of them are removed
            remove_folder(path / "rounds")
            (path / "rounds").mkdir()
    return found
