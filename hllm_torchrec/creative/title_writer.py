"""`TitleWriter`: generates titles for pairs of an item and a cluster, and checks them.

A title depends only on the item, the center of the cluster, the weights and the options. It does not depend on the
other titles of a batch, their order or the number of ranks, except that the rounding of floating-point sums may decide
between two tokens of practically equal probability. With a temperature above 0, a title that breaks a rule of `filters`
is sampled again, at most `retries` times. A title that still breaks a rule is replaced by the item's source text.

Legend: B titles of a batch, K clusters, D width of users' vectors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.common.hashing import hash_json
from hllm_torchrec.config.creative import PLACEHOLDER
from hllm_torchrec.creative.clusters import NO_CLUSTER
from hllm_torchrec.creative.filters import EMPTY, TextRules, check_text
from hllm_torchrec.creative.pairs import PairRule
from hllm_torchrec.data.creative_tokens import CreativeTokenizer, TextTokens, item_columns
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.parallelize import autocast
from hllm_torchrec.modules.creative.decode import Decoded, DecodeOptions, decode

BATCH_TOKENS = 16_384
"""Maximum number of positions of a batch: prompts, soft tokens and responses."""
CUT = "no end token within the maximum length"


@dataclass(frozen=True)
class CreateOptions:
    """Options of `hllm create`.

    pairs: selection of the clusters for which an item gets titles; temperature, top_k, top_p, guidance: see
    `DecodeOptions`; seed: random seed of sampled titles; retries: maximum number of further samples if a title breaks a
    rule; source: text column that replaces a title which still breaks a rule (None: title, or the first text column of
    a dataset without one); rules: limits of `filters.check_text`, None: a title only needs an end token and some text.
    """

    pairs: PairRule = field(default_factory=PairRule)
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 0.95
    guidance: float = 0.0
    seed: int = 0
    retries: int = 2
    source: str | None = None
    rules: TextRules | None = field(default_factory=TextRules)

    @property
    def of_text(self) -> dict[str, Any]:
        """Options on which the text of a title depends."""
        sampled = ("temperature", "top_k", "top_p", "seed", "retries")
        names: tuple[str, ...] = sampled if self.temperature else ("temperature",)
        names += ("guidance",) if self.guidance else ()
        return {name: getattr(self, name) for name in names} | {"rules": self.rules and asdict(self.rules)}


@dataclass(frozen=True)
class TitleRequest:
    """A title to generate.

    key: hash of everything that the title depends on; item: dense id; prompt: tokens of the item's prompt.
    """

    key: str
    item: int
    cluster: int
    prompt: TextTokens


class TitleWriter:
    """Generates titles with a model that is in evaluation mode.

    Args:
        weights: fingerprint of the model's weights.
        centers: [K, D] vector of each cluster.

    Raises:
        ValueError: the prompt names a column that the dataset does not have, or `options.source` is not a text column.
    """

    def __init__(self, experiment: Experiment, weights: str, centers: Floats, options: CreateOptions) -> None:
        dataset, section = experiment.dataset, experiment.config.creative
        self.experiment, self.options, self.centers = experiment, options, torch.from_numpy(centers)
        self.tokenizer = CreativeTokenizer(section)
        self._columns = item_columns(dataset, section)
        missing = [name for name in section.columns if name not in self._columns]
        if missing:
            raise ValueError(
                f"creative.prompt: {{{missing[0]}}}: only the table of texts has this column, but titles are written "
                "for items: train with a prompt of text columns of the dataset"
            )
        texts = dataset.manifest["text_columns"]
        source = options.source or ("title" if "title" in texts else texts[0])
        if source not in texts:
            raise ValueError(f"--source {source}: no text column of {dataset.root}; it has {', '.join(texts)}")
        self._source = ["", *dataset.text([source])[source].to_pylist()]
        self._raw_ids = ["", *dataset.items["raw_item_id"].to_pylist()]
        self._instructions = [part for part in PLACEHOLDER.split(section.prompt)[::2] if part.strip()]
        self._decoding = DecodeOptions(
            self.tokenizer.end,
            section.max_response_length,
            options.temperature,
            options.top_k,
            options.top_p,
            options.guidance,
        )
        self._of_center = {k: hash_json(center.tobytes().hex()) for k, center in enumerate(centers)}
        self._of_center[NO_CLUSTER] = "null"
        self._depends = [weights, options.of_text, section.max_response_length, section.soft.tokens]

    def prompts(self, items: Ints) -> list[TextTokens]:
        """Tokenize the prompts of items [n] (dense ids)."""
        texts = {name: [values[item] or "" for item in items] for name, values in self._columns.items()}
        return self.tokenizer.prompts(texts, items.size)

    def requests(self, item: int, prompt: TextTokens, clusters: Sequence[int]) -> list[TitleRequest]:
        """Return the requests for the titles of an item for some clusters, with their keys."""
        of_item = hash_json([self._depends, prompt.before, prompt.after, *self.facts(item)])
        keys = [hash_json([of_item, self._of_center[cluster], self._seed(item, cluster)])[:32] for cluster in clusters]
        return [TitleRequest(key, item, cluster, prompt) for key, cluster in zip(keys, clusters, strict=True)]

    def facts(self, item: int) -> tuple[str, str]:
        """Return the facts of an item: its source text, and the text columns of the prompt, one per line."""
        return self._source[item] or "", "\n".join(values[item] or "" for values in self._columns.values())

    def _seed(self, item: int, cluster: int) -> str:
        """Return a text from which the seed of a sampled title is derived; empty for greedy decoding."""
        return f"{self.options.seed} {cluster} {self._raw_ids[item]}" if self.options.temperature else ""

    @torch.no_grad()
    def write(self, batch: Sequence[TitleRequest]) -> list[dict[str, Any]]:
        """Generate the titles of a batch from `batches`; returns rows of `titles.WRITTEN`, one per key."""
        rows: dict[str, dict[str, Any]] = {}
        left = list(batch)
        for attempt in range(1 + self.options.retries if self.options.temperature else 1):
            found = self._decode(left, attempt)
            for n, one in enumerate(left):
                ids = [token for token in found.tokens[n].tolist() if token >= 0]
                text = self.tokenizer.decode(ids)
                reasons = self._reasons(one.item, text, bool(found.stopped[n]))
                rows[one.key] = {
                    "key": one.key,
                    "text": self.facts(one.item)[0] if reasons else text,
                    "log_prob": round(float(found.log_prob[n]), 3),  # rounding errors depend on the batch
                    "tokens": len(ids),
                    "fallback": bool(reasons),
                    "reasons": "; ".join(reasons),
                }
            left = [one for one in left if rows[one.key]["fallback"]]
            if not left:
                break
        return list(rows.values())

    def _decode(self, batch: Sequence[TitleRequest], attempt: int) -> Decoded:
        device, hllm = self.experiment.device, self.experiment.hllm
        assert hllm.creative is not None and hllm.creative_head is not None
        items = list(dict.fromkeys(one.item for one in batch))
        prompts = {one.item: one.prompt for one in batch}
        before, after = (
            torch.tensor([getattr(prompts[item], side) for item in items], dtype=torch.int64, device=device)
            for side in ("before", "after")
        )
        clusters = torch.tensor([one.cluster for one in batch])
        is_null = (clusters == NO_CLUSTER).to(device)
        generators = None
        if self.options.temperature:
            seeds = (hash_json([self._seed(one.item, one.cluster), attempt])[:15] for one in batch)
            generators = [torch.Generator().manual_seed(int(seed, 16)) for seed in seeds]
        with autocast(self.experiment.config, device):
            soft_prompt = hllm.creative_head.soft_prompt
            soft = soft_prompt(self.centers[clusters.clamp(min=0)].to(device), is_null)
            item_of = torch.tensor([items.index(one.item) for one in batch], device=device)
            return decode(hllm.creative, before, after, soft, self._decoding, generators, item_of, soft_prompt.null)

    def _reasons(self, item: int, text: str, stopped: bool) -> list[str]:
        if not stopped:
            return [CUT]
        if self.options.rules is None:
            return [] if text else [EMPTY]
        return check_text(text, *self.facts(item), self.options.rules, self._instructions).reasons


def batches(requests: Sequence[TitleRequest], response: int) -> Iterator[list[TitleRequest]]:
    """Yield batches of titles whose prompts have equal lengths, with at most BATCH_TOKENS positions.

    The titles of an item are consecutive, so that its prompt is encoded once per batch.

    Args:
        requests: the titles to generate.
        response: maximum number of positions of the soft tokens and the response together.
    """

    def lengths(one: TitleRequest) -> tuple[int, int]:
        return len(one.prompt.before), len(one.prompt.after)

    batch: list[TitleRequest] = []
    for one in sorted(requests, key=lambda one: (*lengths(one), one.item, one.cluster)):
        is_full = (len(batch) + 1) * (sum(lengths(one)) + response) > BATCH_TOKENS
        if batch and (lengths(one) != lengths(batch[0]) or is_full):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
