"""`CreativeInputs`: the table of personalized texts (creatives) of a run, with its tokens and loaders."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from hllm_torchrec.common.arrays import Floats
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.creative_loader import CreativeLoader
from hllm_torchrec.data.creative_table import CreativeTable
from hllm_torchrec.data.creative_tokens import CreativeTokens, build_creative_tokens
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.derived_files import derived_path
from hllm_torchrec.data.loader import LoaderSpec
from hllm_torchrec.data.request_context import RequestContext
from hllm_torchrec.distributed.coordination import run_on_each_host
from hllm_torchrec.models.hllm import HLLM


@dataclass(frozen=True)
class CreativeInputs:
    """A run's table of creatives; opened by `open`. folder: folder of the table's tokens."""

    config: Config
    dataset: Dataset
    table: CreativeTable
    folder: Path

    @classmethod
    def open(cls, config: Config, dataset: Dataset, model: HLLM) -> "CreativeInputs | None":
        """Open and tokenize the table of a configuration; None if `creative` is not enabled. Collective.

        Raises:
            ConfigError: the tokenizer has larger token ids than the Creative LLM, prompt and response may exceed the
                LLM's positions, or train or valid has no texts.
            ValueError: the table does not exist or is damaged.
        """
        if not config.creative.enabled:
            return None
        table = CreativeTable.open(dataset, config.creative.data)
        first = run_on_each_host(lambda: build_creative_tokens(dataset, table, config.creative))
        own = derived_path(dataset, "tokens", first.name)  # without a shared disk, hosts may have different paths
        found = cls(config, dataset, table, own if own.is_dir() else first)
        if problems := list(found._problems(model)):
            raise ConfigError(problems)
        return found

    def _problems(self, model: HLLM) -> Iterator[str]:
        assert model.creative is not None
        creative, tokens = self.config.creative, self.tokens("train").facts["vocab_size"]
        words = model.creative.backbone.get_input_embeddings().num_embeddings
        if tokens > words:
            yield (
                f"creative.tokenizer: makes token ids up to {tokens - 1}, but the Creative LLM has {words} word "
                "vectors; give the tokenizer of that model"
            )
        for split in ("train", "valid"):
            if not len(self.tokens(split)):
                yield (f"creative.data: {creative.data}: {self.table.path} has no text in {split}; build it anew")
        places = getattr(model.creative.backbone.config, "max_position_embeddings", None)
        longest = creative.max_prompt_length + creative.soft.tokens + creative.max_response_length
        if places is not None and longest > places:
            yield (
                f"creative.max_prompt_length: {creative.max_prompt_length}: prompt, soft tokens and response can have "
                f"{longest} tokens, but the Creative LLM has {places} positions: lower it"
            )

    def tokens(self, split: str) -> CreativeTokens:
        """Return the tokens of a part."""
        return CreativeTokens(self.folder, split)

    def loader(
        self,
        spec: BatchSpec,
        split: str,
        per_batch: int,
        *,
        training: bool = False,
        max_history: int | None = None,
        item_vectors: Floats | None = None,
        context: RequestContext | None = None,
    ) -> CreativeLoader:
        """Create this rank's loader of a part; in training it shuffles, and samples items for
        `creative.losses.match`."""
        config, data = self.config, self.config.data
        matches = training and config.creative.losses.match > 0
        # Visibility is by second even if exposures of the dataset see earlier positions (leave-one-out): a creative has
        # a second but no position in the sequence.
        own = replace(
            spec, visibility="second", item_slots=False, negatives=config.creative.match.negatives if matches else 0
        )
        collator = Collator(self.dataset, own, config.seed, training, item_vectors, context=context)
        loader_spec = LoaderSpec(
            split=split,
            batch_users=per_batch,
            max_history=max_history or data.max_history,
            seed=config.seed,
            shuffle=training,
            prefetch=data.prefetch,
            timeout=config.parallel.timeout,
        )
        return CreativeLoader(
            self.dataset,
            collator,
            self.table.part(split),
            self.tokens(split),
            loader_spec,
            per_batch,
            dist.get_rank(),
            dist.get_world_size(),
            never_alone=training and config.creative.losses.align > 0,
        )
