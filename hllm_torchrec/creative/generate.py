"""The job of `hllm create`: titles of items for clusters of users, into a folder of `titles`.

Per item: a title for each cluster that is kept (`pairs`), and the null title for everybody else. Titles that the folder
has are not written again. Work is divided among the ranks by batches; each keeps what it has written in rounds, and
rank 0 commits all titles at the end.

Legend: n items, K clusters.
"""

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
from hllm_torchrec.creative.title_writer import Asked, CreateOptions, TitleWriter, batches
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
"""Items whose pairs are scored, and whose prompts are tokenized, at a time."""
ROUND_TITLES = 512
"""Titles that a rank writes between two rounds on the disk, about; a crash loses at most these."""


@dataclass(frozen=True)
class CreateReport:
    """items: with titles; too_long: items left out, because of their prompts; titles: all of the items; written: by
    this job; fallbacks: of the titles; reasons: of these; equal_to_null: share of the others that are the null title's
    text."""

    items: int
    too_long: int
    titles: int
    written: int
    fallbacks: int
    reasons: dict[str, int]
    equal_to_null: float


def create_titles(
    loaded: LoadedRun, clusters: Clusters, output: Path, options: CreateOptions, items: Ints | None = None
) -> CreateReport:
    """Write titles with a loaded run, within `loaded.weights`. Collective.

    Args:
        items: ascending dense ids; titles of others stay as they are. None: all items, and none of others.

    Raises:
        ValueError: a run without texts, clusters of another model, options that do not fit, an `output` that holds
            something else or titles of other origin than those to be added, another process that writes to it.
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
    origin = {
        "weights": loaded.fingerprint,
        "centers": clusters.fingerprint,
        "prompt": section.prompt,
        "options": asdict(options),
    }
    chosen = items
    if chosen is None:
        chosen = np.setdiff1d(np.arange(1, experiment.dataset.num_items), experiment.dataset.excluded_items)
    with ExitStack() as stack:
        busy = f"{output}: another process is writing titles into this folder"
        run_on_rank_zero(lambda: prepare_folder(output))
        run_on_rank_zero(lambda: bool(stack.enter_context(hold_lock(output / "lock", busy))))
        job = _Job(writer, clusters, output, options)
        kept = run_on_rank_zero(lambda: job.check_kept(items, origin))
        stack.enter_context(merged(experiment.hllm.eval()))
        stack.enter_context(experiment.evaluation_items())
        job.write(chosen, section.max_prompt_length)
        return run_on_rank_zero(lambda: job.finish(kept, origin))


def _missing(asked: Sequence[Asked], known: pa.Array) -> list[Asked]:
    """Titles without a key in `known`, each key once. Decided by one rank: another might see the folder otherwise."""
    every = {one.key: one for one in asked}
    keys = pa.array(list(every), pa.string())
    missing = run_on_rank_zero(lambda: pc.invert(pc.is_in(keys, value_set=known)).to_pylist())
    return [one for one, is_missing in zip(every.values(), missing, strict=True) if is_missing]


class _Job:
    def __init__(self, writer: TitleWriter, clusters: Clusters, output: Path, options: CreateOptions) -> None:
        self.writer, self.clusters, self.output, self.options = writer, clusters, output, options
        self.raw_ids = writer.experiment.dataset.items["raw_item_id"]
        self.places: list[pa.Table] = []
        self.too_long = self.new = 0

    def check_kept(self, items: Ints | None, origin: dict[str, Any]) -> bool:
        """True if titles of other items are kept. Raises ValueError if these are of another origin."""
        if items is None or not len(committed(self.output)):
            return False
        facts = read_facts(self.output)
        differ = [name for name, value in origin.items() if facts["origin"].get(name) != value]
        if differ:
            raise ValueError(
                f"{self.output}: the titles of other items were written with other {', '.join(differ)}: write those of "
                "all items, or name a new folder"
            )
        return True

    def write(self, items: Ints, longest: int) -> None:
        """Write what is missing of the titles of items. Collective."""
        known = written(self.output)["key"]
        with progress(items.size, "create titles", rank() == 0, "items") as bar:
            for chunk in np.split(items, range(ITEMS_AT_ONCE, items.size, ITEMS_AT_ONCE)):
                asked = self._asked(chunk, longest)
                new = _missing(asked, known)
                self._write_rounds(new)
                self.new += len(new)
                bar.update(chunk.size)

    def _asked(self, items: Ints, longest: int) -> list[Asked]:
        """The titles of items; their places are noted."""
        rule = self.options.pairs
        scores = match_scores(self.writer.experiment, rule.match, self.clusters.centers.centers, items)
        asked, match = [], []
        for item, prompt, own in zip(items.tolist(), self.writer.prompts(items), scores, strict=True):
            if len(prompt.before) + len(prompt.after) > longest:
                self.too_long += 1
                continue
            kept = np.flatnonzero(rule.kept(own[None])[0]) if rule.match != "none" else np.arange(own.size)
            asked += self.writer.asked(item, prompt, [NO_CLUSTER, *kept.tolist()])
            match += [np.nan, *own[kept]]
        place = {
            "raw_item_id": self.raw_ids.take(pa.array([one.item - 1 for one in asked], pa.int64())),
            "cluster": pa.array([one.cluster for one in asked], pa.int32()),
            "match": pa.array(np.array(match, np.float32), from_pandas=True),  # NaN: null
            "key": pa.array([one.key for one in asked], pa.string()),
        }
        self.places.append(pa.table(place))
        return asked

    def _write_rounds(self, asked: Sequence[Asked]) -> None:
        """Write titles on all ranks, and keep them after every round."""
        section = self.writer.experiment.config.creative
        rounds: list[list[list[Asked]]] = [[]]
        for batch in batches(asked, section.soft.tokens + section.max_response_length):
            if sum(map(len, rounds[-1])) >= ROUND_TITLES * world_size():
                rounds.append([])
            rounds[-1].append(batch)
        for one in rounds:
            rows = [row for batch in one[rank() :: world_size()] for row in self.writer.write(batch)]
            run_on_all_ranks(partial(write_round, self.output, rows))

    def finish(self, keep_others: bool, origin: dict[str, Any]) -> CreateReport:
        """Commit all titles; on one rank."""
        places, texts = pa.concat_tables(self.places).combine_chunks(), written(self.output)
        found = texts.take(pc.index_in(places["key"], value_set=texts["key"]))
        columns = {name: (places if name in places.column_names else found)[name] for name in SCHEMA.names}
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
            written=self.new,
            fallbacks=len(fallbacks),
            reasons=dict(Counter(fallbacks["reasons"].to_pylist()).most_common()),
            equal_to_null=float(equal.mean()) if equal.size else 0.0,
        )
