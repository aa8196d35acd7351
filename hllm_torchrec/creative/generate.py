"""The job of `hllm create`: generates titles of items for clusters of users into a folder (`titles`).

Each item gets a title for every cluster that `pairs` selects, and a null title for all other users. Titles that the
folder already contains are not generated again. The ranks share the batches; each rank saves its titles in rounds, and
rank 0 commits all titles at the end.

Legend: n items, K clusters.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.locks import hold_lock
from hllm_torchrec.common.progress import progress
from hllm_torchrec.creative.clusters import NO_CLUSTER, Clusters
from hllm_torchrec.creative.pairs import match_scores
from hllm_torchrec.creative.title_writer import CreateOptions, TitleRequest, TitleWriter, batches
from hllm_torchrec.creative.titles import (
    SCHEMA,
    commit,
    committed,
    prepare_folder,
    read_facts,
    write_round,
    written,
)
from hllm_torchrec.distributed.coordination import rank, run_on_all_ranks, run_on_rank_zero, world_size
from hllm_torchrec.evaluation.run_loader import LoadedRun
from hllm_torchrec.modules.lora import merged

ITEMS_AT_ONCE = 4096
"""Number of items whose pairs are scored and whose prompts are tokenized at a time."""
ROUND_TITLES = 512
"""Approximate number of titles that a rank generates before it saves them; a crash loses about this many per rank."""


@dataclass(frozen=True)
class CreateReport:
    """Result of `create_titles`, for the items that it was given.

    items: number of items with titles; too_long: number of items without titles, because their prompts are too long;
    titles: number of titles; generated: number of titles that the folder did not contain before; fallbacks: number of
    titles that were replaced by the item's source text; reasons: broken rules, joined by "; " -> number of titles that
    were replaced for them; equal_to_null: share of the titles for clusters, without replaced ones, that equal the
    item's null title; None without such titles.
    """

    items: int
    too_long: int
    titles: int
    generated: int
    fallbacks: int
    reasons: dict[str, int]
    equal_to_null: float | None


def create_titles(
    loaded: LoadedRun, clusters: Clusters, output: Path, options: CreateOptions, items: Ints | None = None
) -> CreateReport:
    """Generate titles with a loaded run and commit them. Collective; call it within `loaded.weights`.

    Args:
        clusters: clusters of users that were embedded by the same checkpoint.
        output: folder of the titles.
        items: ascending dense ids of the items that get titles; titles of other items in the folder stay. None: all
            items except forgotten and withdrawn ones, whose titles are removed.

    Raises:
        ValueError: the run was trained without texts; the clusters belong to another checkpoint; the run cannot score
            pairs as `options` ask; `output` contains other files, titles of other items with another origin, or is in
            use.
    """
    experiment, section = loaded.experiment, loaded.experiment.config.creative
    if not section.enabled:
        raise ValueError(f"{loaded.checkpoint}: trained without texts (creative.enabled is false)")
    if clusters.facts["source"].get("weights") != loaded.fingerprint:
        raise ValueError(
            f"{clusters.path}: its users were embedded by another checkpoint than {loaded.checkpoint}: embed them with "
            "this one (hllm embed --users), and cluster them (hllm cluster)"
        )
    options.pairs.check(experiment)
    writer = TitleWriter(experiment, loaded.fingerprint, clusters.centers.centers, options)
    origin = {"weights": loaded.fingerprint, "centers": clusters.fingerprint, "prompt": section.prompt}
    origin["options"] = json.loads(json.dumps(asdict(options)))  # as it is read back: tuples become lists
    chosen = items
    if chosen is None:
        chosen = np.setdiff1d(np.arange(1, experiment.dataset.num_items), experiment.dataset.excluded_items)
    with ExitStack() as stack:
        busy = f"{output}: another process is writing titles into this folder"
        run_on_rank_zero(lambda: prepare_folder(output))
        run_on_rank_zero(lambda: bool(stack.enter_context(hold_lock(output / "lock", busy))))
        job = _Job(writer, clusters, output, options)
        keep_others = run_on_rank_zero(lambda: items is not None and job.can_be_added(origin))
        stack.enter_context(merged(experiment.hllm.eval()))
        if options.pairs.match != "none":  # only predictions of matches read item embeddings
            stack.enter_context(experiment.evaluation_items())
        job.generate(chosen, section.max_prompt_length)
        return run_on_rank_zero(lambda: job.commit(keep_others, origin))


def _missing(requests: Sequence[TitleRequest], known: pa.Array) -> list[TitleRequest]:
    """Return the requests whose keys are not in `known`, one per key. Collective.

    Rank 0 decides, because the ranks may see different states of a shared folder.
    """
    every = {one.key: one for one in requests}
    keys = pa.array(list(every), pa.string())
    missing = run_on_rank_zero(lambda: pc.invert(pc.is_in(keys, value_set=known)).to_pylist())
    return [one for one, is_missing in zip(every.values(), missing, strict=True) if is_missing]


class _Job:
    def __init__(self, writer: TitleWriter, clusters: Clusters, output: Path, options: CreateOptions) -> None:
        self.writer, self.clusters, self.output, self.options = writer, clusters, output, options
        self.raw_ids = writer.experiment.dataset.items["raw_item_id"]
        self.pairs: list[pa.Table] = []
        """raw_item_id, cluster, match and key of each title."""
        self.too_long = self.generated = 0

    def can_be_added(self, origin: dict[str, Any]) -> bool:
        """Check that titles with `origin` may be added to those in the folder; False if the folder has none.

        Raises:
            ValueError: the titles in the folder have another origin.
        """
        if not len(committed(self.output)):
            return False
        facts = read_facts(self.output)
        differ = [name for name, value in origin.items() if facts["origin"].get(name) != value]
        if differ:
            raise ValueError(
                f"{self.output}: the titles of other items were written with other {', '.join(differ)}: write those of "
                "all items, or name a new folder"
            )
        return True

    def generate(self, items: Ints, longest: int) -> None:
        """Generate the missing titles of items [n]. Collective.

        longest: maximum number of tokens of a prompt; items with longer prompts get no titles.
        """
        known = written(self.output)["key"]
        with progress(items.size, "create titles", rank() == 0, "items") as bar:
            for chunk in np.split(items, range(ITEMS_AT_ONCE, items.size, ITEMS_AT_ONCE)):
                missing = _missing(self._requests(chunk, longest), known)
                self._generate_rounds(missing)
                self.generated += len(missing)
                bar.update(chunk.size)

    def _requests(self, items: Ints, longest: int) -> list[TitleRequest]:
        """Return the requests for all titles of items [n], and add them to `self.pairs`. Collective."""
        rule = self.options.pairs
        scores = match_scores(self.writer.experiment, rule.match, self.clusters.centers.centers, items)
        requests: list[TitleRequest] = []
        match: list[float] = []
        for item, prompt, of_clusters in zip(items.tolist(), self.writer.prompts(items), scores, strict=True):
            if len(prompt.before) + len(prompt.after) > longest:
                self.too_long += 1
                continue
            selected = rule.selected(of_clusters)
            requests += self.writer.requests(item, prompt, [NO_CLUSTER, *selected.tolist()])
            match += [np.nan, *of_clusters[selected]]
        pairs = {
            "raw_item_id": self.raw_ids.take(pa.array([one.item - 1 for one in requests], pa.int64())),
            "cluster": pa.array([one.cluster for one in requests], pa.int32()),
            "match": pa.array(np.array(match, np.float32), from_pandas=True),  # NaN becomes null
            "key": pa.array([one.key for one in requests], pa.string()),
        }
        self.pairs.append(pa.table(pairs))
        return requests

    def _generate_rounds(self, requests: Sequence[TitleRequest]) -> None:
        """Generate titles on all ranks, which save them after every round. Collective."""
        section = self.writer.experiment.config.creative
        rounds: list[list[list[TitleRequest]]] = [[]]
        for batch in batches(requests, section.soft.tokens + section.max_response_length):
            if sum(map(len, rounds[-1])) >= ROUND_TITLES * world_size():
                rounds.append([])
            rounds[-1].append(batch)
        for one in rounds:
            run_on_all_ranks(partial(self._save, one[rank() :: world_size()]))

    def _save(self, own: Sequence[Sequence[TitleRequest]]) -> None:
        """Generate batches of titles and save them."""
        write_round(self.output, [row for batch in own for row in self.writer.write(batch)])

    def commit(self, keep_others: bool, origin: dict[str, Any]) -> CreateReport:
        """Commit all titles; called on rank 0 only. keep_others: keep the committed titles of other items."""
        pairs, texts = pa.concat_tables(self.pairs).combine_chunks(), written(self.output)
        found = texts.take(pc.index_in(pairs["key"], value_set=texts["key"]))
        columns = {name: (pairs if name in pairs.column_names else found)[name] for name in SCHEMA.names}
        titles = pa.table(columns).cast(SCHEMA)
        report = self._report(titles)
        if keep_others:
            before = committed(self.output)
            is_own = pc.is_in(before["raw_item_id"], value_set=titles["raw_item_id"])
            titles = pa.concat_tables([titles, before.filter(pc.invert(is_own))])
        clusters = os.path.relpath(self.clusters.path.resolve(), self.output.resolve())
        facts = {
            "clusters": clusters,
            "centers": self.clusters.fingerprint,
            "origin": origin,
            "titles": len(titles),
            "fallbacks": pc.sum(titles["fallback"]).as_py() or 0,
        }
        commit(self.output, titles, facts)
        return report

    def _report(self, titles: pa.Table) -> CreateReport:
        fallbacks = titles.filter(titles["fallback"])
        own = titles.filter(pc.and_(pc.invert(titles["fallback"]), pc.not_equal(titles["cluster"], NO_CLUSTER)))
        null = titles.filter(pc.equal(titles["cluster"], NO_CLUSTER))
        of_item = null["text"].take(pc.index_in(own["raw_item_id"], value_set=null["raw_item_id"]))
        equal = pc.equal(own["text"], of_item).to_numpy()
        return CreateReport(
            items=len(null),
            too_long=self.too_long,
            titles=len(titles),
            generated=self.generated,
            fallbacks=len(fallbacks),
            reasons=dict(Counter(fallbacks["reasons"].to_pylist()).most_common()),
            equal_to_null=float(equal.mean()) if equal.size else None,
        )
