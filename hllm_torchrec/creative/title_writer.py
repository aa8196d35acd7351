"""`TitleWriter`: decodes titles for (item, cluster) pairs and checks them.

A title depends on its item, its center, the weights and the options alone: not on the other titles of a batch, their
order, or the number of ranks, up to the rounding of sums, which decides only between tokens of equal probability. A
title that breaks a rule of `filters` is drawn again, if titles are sampled, and else replaced by the item's source
text, with the reasons.

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
from hllm_torchrec.creative.filters import TextRules, check_text
from hllm_torchrec.creative.pairs import PairRule
from hllm_torchrec.data.creative_tokens import CreativeTokenizer, TextTokens, item_columns
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.parallelize import autocast
from hllm_torchrec.modules.creative.decode import Decoded, DecodeOptions, decode

BATCH_TOKENS = 16_384
"""Positions of a batch of titles: prompts, soft tokens and responses."""
CUT, EMPTY = "no end within the longest response", "empty"


@dataclass(frozen=True)
class CreateOptions:
    """temperature, top_k, top_p: as `DecodeOptions`; seed, retries: of sampled titles; source: text column that stands
    for a title that breaks a rule; rules: of the filters, None: a title must only be whole and not empty."""

    pairs: PairRule = field(default_factory=PairRule)
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 0
    retries: int = 2
    source: str = "title"
    rules: TextRules | None = field(default_factory=TextRules)

    @property
    def of_text(self) -> dict[str, Any]:
        """The options that a title's text depends on."""
        names = ("temperature", "top_k", "top_p", "seed", "retries") if self.temperature else ("temperature",)
        return {name: getattr(self, name) for name in names} | {"rules": self.rules and asdict(self.rules)}


@dataclass(frozen=True)
class Asked:
    """A title to write. item: dense id; key: hash of all it depends on."""

    key: str
    item: int
    cluster: int
    prompt: TextTokens


class TitleWriter:
    """Writes titles with a model in evaluation mode.

    Args:
        weights: fingerprint of the model's weights.
        centers: [K, D] vectors that stand for the users of each cluster.

    Raises:
        ValueError: the prompt names a column that items do not have, or there is no such source text.
    """

    def __init__(self, experiment: Experiment, weights: str, centers: Floats, options: CreateOptions) -> None:
        dataset, section = experiment.dataset, experiment.config.creative
        self.experiment, self.options, self.centers = experiment, options, torch.from_numpy(centers)
        self.tokenizer = CreativeTokenizer(section)
        self._columns = item_columns(dataset, section)
        missing = [name for name in section.columns if name not in self._columns]
        if missing:
            raise ValueError(
                f"creative.prompt: {{{missing[0]}}}: a column of the table of texts alone, and titles are written for "
                "items: train with a prompt of text columns of the dataset"
            )
        texts = dataset.manifest["text_columns"]
        if options.source not in texts:
            raise ValueError(f"--source {options.source}: no text column of {dataset.root}; it has {', '.join(texts)}")
        self._source = ["", *dataset.text([options.source])[options.source].to_pylist()]
        self._raw_ids = ["", *dataset.items["raw_item_id"].to_pylist()]
        self._instructions = [part for part in PLACEHOLDER.split(section.prompt)[::2] if part.strip()]
        self._decoding = DecodeOptions(
            self.tokenizer.end, section.max_response_length, options.temperature, options.top_k, options.top_p
        )
        self._of_center = {k: hash_json(center.tobytes().hex()) for k, center in enumerate(centers)}
        self._of_center[NO_CLUSTER] = "null"
        self._depends = [weights, options.of_text, section.max_response_length, section.soft.tokens]

    def prompts(self, items: Ints) -> list[TextTokens]:
        """Tokens of the prompts of items [n]."""
        texts = {name: [values[item] or "" for item in items] for name, values in self._columns.items()}
        return self.tokenizer.prompts(texts, items.size)

    def asked(self, item: int, prompt: TextTokens, clusters: Sequence[int]) -> list[Asked]:
        """Titles of an item for clusters, with their keys."""
        of_item = hash_json([self._depends, prompt.before, prompt.after, *self.facts(item)])
        keys = [hash_json([of_item, self._of_center[cluster], self._seed(item, cluster)])[:32] for cluster in clusters]
        return [Asked(key, item, cluster, prompt) for key, cluster in zip(keys, clusters, strict=True)]

    def facts(self, item: int) -> tuple[str, str]:
        """Source text of an item, and the texts of its prompt, a line each: what a title may say."""
        return self._source[item] or "", "\n".join(values[item] or "" for values in self._columns.values())

    def _seed(self, item: int, cluster: int) -> str:
        """What the draws of a sampled title depend on, beside the attempt; nothing for greedy ones."""
        return f"{self.options.seed} {cluster} {self._raw_ids[item]}" if self.options.temperature else ""

    @torch.no_grad()
    def write(self, batch: Sequence[Asked]) -> list[dict[str, Any]]:
        """Rows of `titles.WRITTEN` of a batch of `batches`."""
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
                    "log_prob": round(float(found.log_prob[n]), 3),  # further digits depend on the batch
                    "tokens": len(ids),
                    "fallback": bool(reasons),
                    "reasons": "; ".join(reasons),
                }
            left = [one for one in left if rows[one.key]["fallback"]]
            if not left:
                break
        return list(rows.values())

    def _decode(self, batch: Sequence[Asked], attempt: int) -> Decoded:
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
            soft = hllm.creative_head.soft_prompt(self.centers[clusters.clamp(min=0)].to(device), is_null)
            item_of = torch.tensor([items.index(one.item) for one in batch], device=device)
            return decode(hllm.creative, before, after, soft, self._decoding, generators, item_of)

    def _reasons(self, item: int, text: str, stopped: bool) -> list[str]:
        if not stopped:
            return [CUT]
        if self.options.rules is None:
            return [] if text else [EMPTY]
        return check_text(text, *self.facts(item), self.options.rules, self._instructions).reasons


def batches(asked: Sequence[Asked], response: int) -> Iterator[list[Asked]]:
    """Yield titles in batches of about BATCH_TOKENS positions, of prompts of equal lengths; an item's stay together.

    response: positions of a response with its soft tokens.
    """

    def lengths(one: Asked) -> tuple[int, int]:
        return len(one.prompt.before), len(one.prompt.after)

    batch: list[Asked] = []
    for one in sorted(asked, key=lambda one: (*lengths(one), one.item, one.cluster)):
        is_full = (len(batch) + 1) * (sum(lengths(one)) + response) > BATCH_TOKENS
        if batch and (lengths(one) != lengths(batch[0]) or is_full):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
