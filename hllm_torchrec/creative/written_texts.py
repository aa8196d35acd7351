"""Evaluation of generated texts: a run generates texts for creatives of a split, and they are compared with references.

A text is generated for each creative under several conditions: with the vector of the right user, with the learned
tokens for unknown users (null), and with other given vectors, such as centers of clusters. The overlap of the null text
with the reference is the baseline without a user, because the null text is generated from the item alone.

Legend: N creatives, D width of a user vector.
"""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.creative.clusters import NO_CLUSTER
from hllm_torchrec.creative.support import support
from hllm_torchrec.creative.text_metrics import rouge_l, rouge_n
from hllm_torchrec.creative.title_writer import CreateOptions, TitleRequest, TitleWriter, batches
from hllm_torchrec.distributed.array_collectives import gather_objects
from hllm_torchrec.distributed.coordination import rank, world_size
from hllm_torchrec.evaluation.creative_scores import CreativeVectors
from hllm_torchrec.metrics.bootstrap import user_mean_interval
from hllm_torchrec.models.experiment import Experiment

MEASURES = ("rouge_1", "rouge_l", "support")


def written_texts(
    experiment: Experiment,
    vectors: CreativeVectors,
    conditions: Mapping[str, Tensor],
    most: int,
) -> dict[str, Any]:
    """Generate texts greedily for at most `most` creatives, spread evenly over the split. Collective.

    Args:
        vectors: user vectors of the creatives of a split.
        conditions: name -> vectors [N, D] for the users, in addition to "right" and "null".
        most: number of creatives.

    Returns:
        texts: number of creatives; conditions: for each condition the means of `MEASURES`, and the share of texts that
        equal the null text; right - null: mean difference of each measure, with a 95% interval over users;
        support_of_references: mean support of the references; cost: texts and tokens per second, and peak memory, of
        this rank.
    """
    loader = vectors.loader
    experiment.hllm.eval()
    chosen = np.linspace(0, len(loader) - 1, min(most, len(loader))).astype(np.int64)
    own = chosen[rank() :: world_size()]
    rows = loader.tokens.rows[own]
    items, references = loader.part.item_ids[rows], loader.part.rows["response"].take(pa.array(rows)).to_pylist()
    texts: dict[str, list[str]] = {}
    seconds, tokens = 0.0, 0
    for name, users in {"right": vectors.vectors, "null": vectors.vectors, **conditions}.items():
        is_null = ~vectors.known[own] | (name == "null")
        writer, asked = _requests(experiment, users[torch.from_numpy(own)], is_null, items)
        began = time.perf_counter()
        texts[name], written = _write(writer, asked, experiment)
        seconds, tokens = seconds + time.perf_counter() - began, tokens + written
    facts = [writer.facts(item) for item in items.tolist()]
    scores = _scores(texts, references, facts)
    scores["user"] = vectors.user_ids[own].tolist()
    found = _summary(_joined(gather_objects(scores)), list(texts))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    count = own.size * len(texts)
    found["cost"] = {
        "titles_per_second": count / seconds if seconds else float("nan"),
        "tokens_per_second": tokens / seconds if seconds else float("nan"),
        "peak_bytes": peak,
    }
    return found


def texts_of_part(experiment: Experiment, vectors: CreativeVectors) -> list[tuple[str, str]]:
    """Generate a text greedily for each creative of a part; returns their (raw item id, text) in order. Collective."""
    loader = vectors.loader
    experiment.hllm.eval()
    own = np.arange(rank(), len(loader), world_size())
    rows = loader.tokens.rows[own]
    users, is_null = vectors.vectors[torch.from_numpy(own)], ~vectors.known[own]
    writer, asked = _requests(experiment, users, is_null, loader.part.item_ids[rows])
    raw_items = loader.part.rows["raw_item_id"].take(pa.array(rows)).to_pylist()
    texts, _ = _write(writer, asked, experiment)
    found = gather_objects(list(zip(own.tolist(), raw_items, texts, strict=True)))
    return [(raw, text) for _, raw, text in sorted(row for of_rank in found for row in of_rank)]


def _requests(
    experiment: Experiment, users: Tensor, is_null: np.ndarray, items: Ints
) -> tuple[TitleWriter, list[TitleRequest]]:
    """Return a request for one text for each of n items, and the writer.

    users: [n, D] user vectors; is_null: bool [n], whether the null tokens replace the user vector.
    """
    # Each creative is treated as a cluster with the user's vector as center.
    writer = TitleWriter(experiment, "", users.numpy(), CreateOptions(rules=None))
    prompts = enumerate(zip(items.tolist(), writer.prompts(items), strict=True))
    clusters = [NO_CLUSTER if null else n for n, null in enumerate(is_null)]
    return writer, [writer.requests(item, prompt, [clusters[n]])[0] for n, (item, prompt) in prompts]


def _write(writer: TitleWriter, asked: list[TitleRequest], experiment: Experiment) -> tuple[list[str], int]:
    """Generate texts; returns them in the order of the requests, and the number of their tokens."""
    section = experiment.config.creative
    rows = {
        row["key"]: row
        for batch in batches(asked, section.soft.tokens + section.max_response_length)
        for row in writer.write(batch)
    }
    return [rows[one.key]["text"] for one in asked], sum(rows[one.key]["tokens"] for one in asked)


def _scores(
    texts: Mapping[str, list[str]], references: list[str], facts: list[tuple[str, str]]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"support of references": [support(*one).share for one in zip(references, facts)]}
    for name, own in texts.items():
        found[f"{name} rouge_1"] = [rouge_n(*one) for one in zip(own, references, strict=True)]
        found[f"{name} rouge_l"] = [rouge_l(*one) for one in zip(own, references, strict=True)]
        found[f"{name} support"] = [support(*one).share for one in zip(own, facts, strict=True)]
        found[f"{name} equal"] = [float(a == b) for a, b in zip(own, texts["null"], strict=True)]
    return found


def _joined(parts: list[dict[str, list[float]]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([np.asarray(part[name], np.float64) for part in parts]) for name in parts[0]}


def _summary(scores: Mapping[str, np.ndarray], conditions: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "texts": int(scores["user"].size),
        "support_of_references": float(scores["support of references"].mean()),
        "conditions": {
            name: {measure: float(scores[f"{name} {measure}"].mean()) for measure in MEASURES}
            | {"equal_to_null": float(scores[f"{name} equal"].mean())}
            for name in conditions
        },
        "right - null": {},
    }
    for measure in MEASURES:
        gained = scores[f"right {measure}"] - scores[f"null {measure}"]
        low, high = user_mean_interval(gained, scores["user"].astype(np.int64))
        found["right - null"][measure] = {"mean": float(gained.mean()), "interval": [low, high]}
    return found
