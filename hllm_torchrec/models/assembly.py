"""What a configuration stands for once it meets a dataset: batch spec, token store, model, loaders.

Training and the offline evaluation job build their parts here, so that both score with the same inputs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.config.eval_protocols import dataset_problems
from hllm_torchrec.config.rules import takes_stored_items
from hllm_torchrec.config.schema import Config, ItemLLMConfig
from hllm_torchrec.data.batch_spec import BatchSpec, check_batch_spec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset, base_rate
from hllm_torchrec.data.item_factors import item_vectors
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.data.stochastic_length import StochasticLength
from hllm_torchrec.data.token_store import TokenStore, build_token_store
from hllm_torchrec.distributed.collectives import all_gather_variable
from hllm_torchrec.distributed.coordination import run_on_each_host
from hllm_torchrec.distributed.wrappers import unwrap_model
from hllm_torchrec.embedding.tables import initialize_tables
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.hllm import HLLM, item_space
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import CachedItems, LiveItems, StoredItems
from hllm_torchrec.models.item_subsampling import SubsampledEncoder
from hllm_torchrec.models.lora_base import base_fingerprints, without_base_weights
from hllm_torchrec.models.named_backbones import backbone_sections, text_sections
from hllm_torchrec.models.parallelize import parallelize
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.fusion import Fusion

LOOKUP_CHUNK = 65_536
"""Rows of a frozen item table that all ranks together look up at a time."""
MEASURED_ITEMS, MEASURED_CHUNK = 1024, 64
"""Items that `measure_item_statistics` encodes."""


@dataclass
class Experiment:
    """A configuration on a dataset, on this rank."""

    config: Config
    dataset: Dataset
    batch_spec: BatchSpec
    device: torch.device
    model: DistributedModelParallel
    text_encoders: dict[str, ItemEncoder]
    """Of the parts of the model that read text: see `named_backbones`."""
    live_items: LiveItems | None
    item_vectors: NDArray[np.float32] | None
    base_fingerprints: dict[str, str] = field(default_factory=dict)
    """Fingerprints of weights that checkpoints leave out: see `lora_base`."""

    @property
    def hllm(self) -> HLLM:
        """The model inside its distributed wrappers."""
        inner = unwrap_model(self.model)
        assert isinstance(inner, HLLM)
        return inner

    @property
    def item_encoder(self) -> ItemEncoder | None:
        """Reads the items' texts; None in an ID-only model."""
        return self.text_encoders.get("item_llm")

    def model_state(self) -> dict[str, Any]:
        """The model's tensors that a checkpoint holds: loading into them in place restores it."""
        return without_base_weights(self.model.state_dict(), self.config)

    def averaged_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What `optim.ema` averages: all dense parts but those that read text, whose cached embeddings stay valid."""
        left_out = tuple(f"{part.name}." for part in self.hllm.named_backbones() if part.module.reads_text)
        return [(name, p) for name, p in self.hllm.named_parameters() if not name.startswith(left_out)]

    def loader(
        self,
        split: str,
        batch_users: int,
        *,
        training: bool = False,
        max_history: int | None = None,
        batch_item_tokens: int = 0,
    ) -> Loader:
        """Batches of a split on this rank; training ones of the events that `data.train_part` names.

        Outside of training, where exposures see earlier positions (leave one out), they see as much as
        `max_history` allows. batch_item_tokens: see `data.batch_item_tokens`.
        """
        whole = training and split == "train" and self.config.data.train_part == "train_and_valid"
        costs = self.item_encoder.tokens.lengths + 1 if batch_item_tokens and self.item_encoder is not None else None
        data, longest = self.config.data, max_history or self.config.data.max_history
        shortening = None
        if training and data.stochastic_length:
            shortening = StochasticLength(data.stochastic_length, longest, data.stochastic_choice, self.config.seed)
        collator = Collator(self.dataset, self.batch_spec, self.config.seed, training, self.item_vectors, shortening)
        spec = LoaderSpec(
            split="valid" if whole else split,
            batch_users=batch_users,
            max_history=longest,
            seed=self.config.seed,
            shuffle=training,
            batch_cost=batch_item_tokens,
            item_costs=costs,
            all_events=whole,
            extend_history=not training and self.batch_spec.visibility == "position",
            user_share=data.train_users if training else 1.0,
            prefetch=data.prefetch,
            timeout=self.config.parallel.timeout,
        )
        return Loader(self.dataset, collator, spec, dist.get_rank(), dist.get_world_size())

    def cold_items(self) -> NDArray[np.bool_]:
        """[N] items without a training event."""
        return self.dataset.training_item_counts() == 0

    def encode_catalogue(self) -> Tensor | None:
        """Embeddings [N, E] of every item by the present weights; None in an ID-only model. Collective.

        Where item embeddings are stored they are looked up in the frozen table.
        """
        if self.item_encoder is None:
            return None
        if isinstance(self.hllm.item_source, StoredItems):
            return self._look_up_catalogue()
        assert self.live_items is not None
        embed = partial(self.hllm.embed_items, source=self.live_items)
        return self.item_encoder.encode_catalogue(self.live_items.item_llm, embed, show=dist.get_rank() == 0)

    def use_live_items(self) -> None:
        """Let the model make item embeddings by its present weights; where they are stored nothing changes."""
        if not isinstance(self.hllm.item_source, StoredItems):
            self.hllm.item_source = self.live_items

    def use_cached_items(self) -> None:
        """Encode the catalogue by the present weights, and let the model take items from there. Collective."""
        catalogue = self.encode_catalogue()
        if catalogue is not None:
            self.hllm.item_source = CachedItems(catalogue)

    @contextmanager
    def evaluation_items(self) -> Iterator[None]:
        """Within the context items that a step would encode come from a cache of the catalogue. Collective."""
        source = self.hllm.item_source
        if self.hllm.encodes_items:
            self.use_cached_items()
        try:
            yield
        finally:
            self.hllm.item_source = source

    @torch.no_grad()
    def measure_item_statistics(self) -> dict[str, float]:
        """Give the model's `Standardize` the embeddings of up to MEASURED_ITEMS items, spaced evenly. Collective.

        Returns:
            `length`, their mean length, and `common`, the length of their mean: what all have in common.
        """
        assert self.hllm.standardise is not None
        number = self.dataset.num_items - 1
        ids = torch.linspace(1, number, min(number, MEASURED_ITEMS), dtype=torch.float64).long().to(self.device)
        was_training = self.hllm.training
        self.hllm.eval()
        items = torch.cat([self.hllm.embed_items(some).float() for some in ids.split(MEASURED_CHUNK)])
        self.hllm.train(was_training)
        self.hllm.standardise.measure(items)
        return {"length": items.norm(dim=1).mean().item(), "common": items.mean(0).norm().item()}

    @torch.no_grad()
    def _look_up_catalogue(self) -> Tensor:
        """[N, E] of the frozen table, looked up in blocks that the ranks share."""
        world, rank, rows = dist.get_world_size(), dist.get_rank(), []
        for block in torch.arange(self.dataset.num_items, device=self.device).split(LOOKUP_CHUNK):
            rows.append(all_gather_variable(self.hllm.embed_items(block.tensor_split(world)[rank])))
        return torch.cat(rows)


def build_experiment(config: Config, device: torch.device) -> Experiment:
    """Open the dataset, tokenise what is not yet tokenised, build and parallelize the model. Collective.

    Raises:
        ConfigError: the configuration does not fit the dataset or the device.
    """
    dataset = Dataset.open(Path(config.data.dataset))
    spec = batch_spec_of(config, dataset)
    problems = [
        *check_batch_spec(spec, dataset),
        *_missing_models(config),
        *dataset_problems(config, dataset.manifest),
    ]
    if problems:
        raise ConfigError(problems)
    encoders = {
        name: _text_encoder(name, section, open_token_store(section, dataset, name), device)
        for name, section in text_sections(config)
    }
    torch.manual_seed(config.seed)
    vectors = _item_vectors(config, dataset)
    width = 0 if vectors is None else vectors.shape[1]
    model = build_model(config, spec.tables(dataset), base_rate(dataset), torch.device("meta"), width)
    share, encoder, live = config.item_llm.trained_share, encoders.get("item_llm"), None
    if encoder is not None and model.item_llm is not None:
        sampled = SubsampledEncoder(encoder, share, config.item_llm.refresh_after, config.seed) if share < 1 else None
        live = LiveItems(model.item_llm, sampled or encoder)
    if not takes_stored_items(config):
        model.item_source = live
    problems = [problem for name in encoders for problem in _vocabulary_problems(model, name, encoders[name])]
    if problems:
        raise ConfigError(problems)
    bases = base_fingerprints(model, config)
    wrapped = parallelize(model, config, device)
    initialize_tables(wrapped, config.seed, config.features.init_scale)
    torch.manual_seed(config.seed * 1_000_003 + dist.get_rank() + 1)  # dropout differs between ranks
    return Experiment(config, dataset, spec, device, wrapped, encoders, live, vectors, bases)


def _text_encoder(name: str, section: ItemLLMConfig, tokens: TokenStore, device: torch.device) -> ItemEncoder:
    return ItemEncoder(tokens, device, section.share_prefix and section.causal, section.items_at_once, name)


def batch_spec_of(config: Config, dataset: Dataset) -> BatchSpec:
    """What a batch of this configuration holds."""
    generates = config.objective.generates
    return BatchSpec(
        fusion=Fusion(config.objective.fusion),
        history=config.data.history,
        visibility=dataset.visibility,
        negatives=config.objective.negatives if generates else 0,
        item_slots=generates and item_space(config) == "features",
        positive_targets_only=config.objective.positive_targets_only,
        item_id=config.features.item_id,
        action=config.features.action,
        action_gate=config.features.action_gate,
        time_depth=config.features.time_depth,
        item_features=config.data.item_features,
        user_features=config.data.user_features,
        numeric_features=config.data.numeric_features,
        id_dropout=config.data.id_dropout,
        interleaved=config.user.actions == "interleaved",
        cold_dropout=config.data.cold_dropout,
    )


def _item_vectors(config: Config, dataset: Dataset) -> NDArray[np.float32] | None:
    """[N, V] all dense item features side by side, or None; fitted where they are not there yet."""
    names = config.data.item_vectors
    run_on_each_host(lambda: [item_vectors(dataset, name).shape for name in names])
    if not names:
        return None
    vectors = np.concatenate([item_vectors(dataset, name) for name in names], axis=1)
    if config.data.cold_dropout:
        vectors[dataset.training_item_counts() == 0] = 0
    return vectors


def _missing_models(config: Config) -> Iterator[str]:
    """Pretrained models (Hugging Face would look for them on the network), and an item store, that are not there."""
    store = config.item_llm.store
    if store is not None and url_of(store) is None and not (Path(store) / "store.json").is_file():
        yield f"item_llm.store: {store}: no embedding store (no store.json); make it with `hllm embed --items {store}`"
    for part, section in backbone_sections(config):
        directory = section.pretrained
        if directory is not None and not (Path(directory) / "config.json").is_file():
            yield (
                f"{part}.pretrained: {directory}: not a Hugging Face directory (no config.json); download one "
                "(`hllm fetch --help` has two)"
            )


def open_token_store(item: ItemLLMConfig, dataset: Dataset, name: str = "item_llm") -> TokenStore:
    """The tokens of the dataset's items as an LLM reads them, made where they are not there yet. Collective.

    name: of the section `item` of the configuration.

    Raises:
        ConfigError: there is no tokeniser.
    """
    tokenizer = item.tokenizer or item.pretrained
    if tokenizer is None:
        raise ConfigError(f"{name}.tokenizer: none: an Item LLM from scratch still needs a tokeniser directory")

    def build() -> Path:
        return build_token_store(
            dataset,
            tokenizer,
            prompt=item.prompt,
            keys=list(item.text_keys),
            max_text_length=item.max_text_length,
            separator=item.separator,
        )

    first = run_on_each_host(build)
    own = dataset.root / "tokens" / first.name  # hosts that share no disk may have the dataset elsewhere
    return TokenStore.open(own if own.is_dir() else first)


def _vocabulary_problems(model: HLLM, name: str, encoder: ItemEncoder) -> Iterator[str]:
    """Tokens and places that an LLM has no vector for: looking up one that is not there would crash."""
    llm: ItemLLM = getattr(model, name)
    words, tokens = llm.backbone.get_input_embeddings().num_embeddings, encoder.tokens.facts["vocab_size"]
    if tokens > words:
        yield (
            f"{name}.tokenizer: makes token ids up to {tokens - 1}, but the Item LLM has {words} word vectors: give "
            "the tokeniser of that model, or a shape with a larger vocab_size"
        )
    learned = getattr(getattr(llm.backbone, "embeddings", None), "position_embeddings", None)  # BERT's
    places = math.inf if learned is None else learned.num_embeddings
    own = int(llm.pooling == "item")
    longest = int(encoder.tokens.lengths.max())
    if longest + own > places:
        yield (
            f"{name}.max_text_length: the longest text has {longest} tokens{', and [ITEM] follows' * own}, but the "
            f"Item LLM has {places} position vectors: at most {places - own}"
        )
