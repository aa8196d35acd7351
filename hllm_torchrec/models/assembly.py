"""Assembly of an experiment from a configuration and a dataset: batch spec, token stores, model, loaders.

Training and the offline evaluation job build their parts here, so that both score with the same inputs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from hllm_torchrec.checkpoint.layout import read_checkpoint_json
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.seconds import second_of
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.config.eval_protocols import dataset_problems
from hllm_torchrec.config.loading import to_dict
from hllm_torchrec.config.rules import takes_stored_items
from hllm_torchrec.config.schema import Config, ItemLLMConfig
from hllm_torchrec.data.batch_spec import BatchSpec, check_batch_spec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.creative_loader import CreativeLoader
from hllm_torchrec.data.dataset import Dataset, base_rate
from hllm_torchrec.data.derived_files import derived_path
from hllm_torchrec.data.evidence import FILE as EVIDENCE_FILE
from hllm_torchrec.data.evidence import Evidence, EvidenceModel, evidence_problems
from hllm_torchrec.data.item_factors import FACTORS, item_vectors
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.data.request_context import RequestContext, fit_context
from hllm_torchrec.data.run_factors import FILE, RunFactors
from hllm_torchrec.data.stochastic_length import StochasticLength
from hllm_torchrec.data.token_store import TokenStore, build_token_store
from hllm_torchrec.data.transitions import FILE as TRANSITIONS_FILE
from hllm_torchrec.data.transitions import Transitions
from hllm_torchrec.distributed.collectives import all_gather_variable
from hllm_torchrec.distributed.coordination import run_on_each_host
from hllm_torchrec.distributed.wrappers import unwrap_model
from hllm_torchrec.embedding.tables import initialize_tables
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.creative_inputs import CreativeInputs
from hllm_torchrec.models.hllm import HLLM, ContextInputs, item_space
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import CachedItems, LiveItems, StoredItems
from hllm_torchrec.models.item_subsampling import SubsampledEncoder
from hllm_torchrec.models.lora_base import base_fingerprints, check_base_weights, without_base_weights
from hllm_torchrec.models.named_backbones import backbone_sections, text_sections
from hllm_torchrec.models.parallelize import parallelize
from hllm_torchrec.models.run_evidence import EVIDENCE_KEY, frozen_catalogue, open_evidence, reads_texts
from hllm_torchrec.models.run_transitions import (
    TRANSITIONS_KEY,
    compares_texts,
    open_transitions,
    transition_similarity,
)
from hllm_torchrec.models.run_vocabulary import FACTORS_KEY, VOCABULARY, check_vocabulary, experiment_marks
from hllm_torchrec.models.tasks import fit_tasks, is_single, resolve_tasks, task_problems
from hllm_torchrec.models.text_format import text_format
from hllm_torchrec.modules.encoders.backbone import learned_positions
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.fusion import Fusion

CONTEXT_KEY = "context"
"""Key of the values of context that a run was trained with in a checkpoint's `extra.json`."""
LOOKUP_CHUNK = 65_536
"""Rows of a frozen item table that all ranks together look up at a time."""
MEASURED_ITEMS, WHITENED_ITEMS, MEASURED_CHUNK = 1024, 16_384, 64
"""Items that `measure_item_statistics` encodes: in total, in total for a covariance, and per call."""


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
    factors: RunFactors | None = None
    """Item factors of the run, without those of new items; None: it has none of its own."""
    evidence: Evidence | None = None
    context: RequestContext | None = None
    """What requests tell; None: nothing that the model reads."""
    frozen_catalogue: Tensor | None = None
    """Embeddings [N, E] of all items by the frozen Item LLM, that evidence and transitions compare; None: encode them
    when needed."""
    creatives: CreativeInputs | None = None
    transitions: Transitions | None = None

    @property
    def hllm(self) -> HLLM:
        """The model inside its distributed wrappers."""
        inner = unwrap_model(self.model)
        assert isinstance(inner, HLLM)
        return inner

    @cached_property
    def facts(self) -> dict[str, Any]:
        """JSON values that checkpoints record of the model's origin and inputs. Collective at the first use."""
        return {
            "config": to_dict(self.config),
            "bases": self.base_fingerprints,
            "dataset": {"version": self.dataset.version, "fingerprint": self.dataset.fingerprint},
            FACTORS_KEY: None if self.factors is None else self.factors.fingerprint,
            EVIDENCE_KEY: None if self.evidence is None else self.evidence.model.fingerprint,
            VOCABULARY: experiment_marks(self.config, self.dataset),
            **({} if self.transitions is None else {TRANSITIONS_KEY: self.transitions.fingerprint}),
            **({} if self.context is None else {CONTEXT_KEY: self.context.state()}),
        }

    def check_origin(self, checkpoint: Path) -> None:
        """Check that a checkpoint of the same run fits the dataset's ids and the other inputs. Collective.

        Raises:
            ValueError: it was trained with other ids, item factors or base weights (LoRA).
        """
        check_vocabulary(self.config, self.dataset, checkpoint, also=["items"] if self.transitions else [])
        extra = read_checkpoint_json(checkpoint / "extra.json")
        check_base_weights(extra, self.base_fingerprints, self.config, checkpoint)
        if self.context is not None:
            self.context.restore(extra.get(CONTEXT_KEY, {}))
        own = None if self.factors is None else self.factors.fingerprint
        if FACTORS in self.config.data.item_vectors and extra.get(FACTORS_KEY) != own:
            raise ValueError(
                f"{checkpoint} was trained with other item factors than the run's {FILE}: restore that file"
            )
        if self.evidence is not None and extra.get(EVIDENCE_KEY) != self.evidence.model.fingerprint:
            raise ValueError(
                f"{checkpoint} was trained with other evidence than the run's {EVIDENCE_FILE}: restore that file"
            )
        if self.transitions is not None and extra.get(TRANSITIONS_KEY) != self.transitions.fingerprint:
            raise ValueError(
                f"{checkpoint} was saved with other transitions than the run's {TRANSITIONS_FILE}: restore that file"
            )

    @property
    def item_encoder(self) -> ItemEncoder | None:
        """Reads the items' texts; None in an ID-only model."""
        return self.text_encoders.get("item_llm")

    def model_state(self) -> dict[str, Any]:
        """The model's tensors that a checkpoint holds: loading into them in place restores it."""
        return without_base_weights(self.model.state_dict(), self.config)

    def averaged_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Parameters that `optim.ema` averages: all dense parts except those that read text.

        Averaged Item LLM weights would invalidate cached item embeddings.
        """
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

        Outside of training exposures see what the scorer's requests see: see `evaluation.history`; where they see
        earlier positions (leave one out), as much as `max_history` allows. batch_item_tokens: see
        `data.batch_item_tokens`.
        """
        whole = training and split == "train" and self.config.data.train_part == "train_and_valid"
        # + 1: the [ITEM] token that the Item LLM appends to each text.
        costs = self.item_encoder.tokens.lengths + 1 if batch_item_tokens and self.item_encoder is not None else None
        data, longest = self.config.data, max_history or self.config.data.max_history
        by_position = self.batch_spec.visibility == "position"
        shortening = None
        if training and data.stochastic_length:
            shortening = StochasticLength(data.stochastic_length, longest, data.stochastic_choice, self.config.seed)
        collator = Collator(
            self.dataset,
            self.batch_spec,
            self.config.seed,
            training,
            self.item_vectors,
            shortening,
            self.evidence,
            of_fit=split == "train",
            context=self.context,
        )
        spec = LoaderSpec(
            split="valid" if whole else split,
            batch_users=batch_users,
            max_history=longest,
            seed=self.config.seed,
            shuffle=training,
            batch_cost=batch_item_tokens,
            item_costs=costs,
            all_events=whole,
            extend_history=not training and by_position,
            as_requests=not training and not by_position and self.config.evaluation.history == "request",
            since=second_of(data.train_since or 0) if training else 0,
            user_share=data.train_users if training else 1.0,
            prefetch=data.prefetch,
            timeout=self.config.parallel.timeout,
        )
        return Loader(self.dataset, collator, spec, dist.get_rank(), dist.get_world_size())

    def creative_loader(
        self, split: str, per_batch: int, *, training: bool = False, max_history: int | None = None
    ) -> CreativeLoader:
        """Batches of the creatives of a split on this rank: see `CreativeInputs.loader`."""
        assert self.creatives is not None, "the configuration has no creatives"
        return self.creatives.loader(
            self.batch_spec,
            split,
            per_batch,
            training=training,
            max_history=max_history,
            item_vectors=self.item_vectors,
            context=self.context,
        )

    def cold_items(self) -> NDArray[np.bool_]:
        """[N] items without a training event."""
        return self.dataset.training_item_counts() == 0

    def encode_catalogue(self) -> Tensor | None:
        """Embeddings [N, E] of all items with the current weights; None in an ID-only model. Collective.

        Stored item embeddings are looked up in the frozen table instead.
        """
        if self.item_encoder is None:
            return None
        if self.frozen_catalogue is not None:
            return self.frozen_catalogue
        if isinstance(self.hllm.item_source, StoredItems):
            return self._look_up_catalogue()
        assert self.live_items is not None
        embed = partial(self.hllm.embed_items, source=self.live_items)
        return self.item_encoder.encode_catalogue(self.live_items.item_llm, embed, show=dist.get_rank() == 0)

    def use_live_items(self) -> None:
        """Make the model compute item embeddings with its current weights; no effect on stored embeddings."""
        if not isinstance(self.hllm.item_source, StoredItems):
            self.hllm.item_source = self.live_items

    def use_cached_items(self) -> None:
        """Encode the catalogue with the current weights and make the model look items up in it. Collective."""
        catalogue = self.encode_catalogue()
        if catalogue is not None:
            self.hllm.item_source = CachedItems(catalogue)

    @contextmanager
    def evaluation_items(self) -> Iterator[None]:
        """Context manager: items that a step would encode come from a cache of the catalogue. Collective."""
        source = self.hllm.item_source
        if self.hllm.encodes_items:
            self.use_cached_items()
        try:
            yield
        finally:
            self.hllm.item_source = source

    @torch.no_grad()
    def measure_item_statistics(self) -> dict[str, float]:
        """Fit the model's `Standardize` or `Whiten` on items spaced evenly over the catalogue. Collective.

        Returns:
            `length`, the mean L2 norm, and `common`, the L2 norm of the mean embedding (the part shared by all).
        """
        assert self.hllm.standardise is not None
        most = WHITENED_ITEMS if self.config.item_llm.whiten else MEASURED_ITEMS
        number = self.dataset.num_items - 1  # item 0 is the unknown item
        # float64: float32 cannot represent all ids above 2^24.
        ids = torch.linspace(1, number, min(number, most), dtype=torch.float64).long().to(self.device)
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
            # Contiguous parts in rank order: the gathered rows are in id order. A rank's part may be empty.
            rows.append(all_gather_variable(self.hllm.embed_items(block.tensor_split(world)[rank])))
        return torch.cat(rows)


def build_experiment(
    config: Config,
    device: torch.device,
    *,
    factors: RunFactors | None = None,
    evidence: EvidenceModel | None = None,
    transitions: Transitions | None = None,
    version: int | None = None,
) -> Experiment:
    """Open the dataset, tokenise texts that are not yet tokenised, build and parallelize the model. Collective.

    Args:
        factors: item factors of the run; None: those beside the dataset, if the configuration has any.
        evidence: fitted evidence of the run; None: fitted here, if the configuration has any.
        transitions: the same of transitions.
        version: version of the dataset to read; None: `data.version`.

    Raises:
        ConfigError: the configuration does not fit the dataset or the device.
    """
    dataset = Dataset.open(Path(config.data.dataset), version or config.data.version)
    spec = batch_spec_of(config, dataset)
    problems = [
        *task_problems(config.objective, dataset.schema),
        *check_batch_spec(spec, dataset),
        *evidence_problems(config.data.evidence),
        *_missing_models(config),
        *dataset_problems(config, dataset.manifest),
    ]
    if problems:
        raise ConfigError(problems)
    tokens = {name: open_token_store(section, dataset, name) for name, section in text_sections(config)}
    torch.manual_seed(config.seed)  # the same initial dense weights on all ranks
    vectors = _item_vectors(config, dataset, factors)
    width = 0 if vectors is None else vectors.shape[1]
    since = second_of(config.data.train_since or 0)
    tasks = resolve_tasks(config.objective, dataset.schema)
    if spec.tasks:
        tasks = fit_tasks(tasks, dataset, since)
    rate, context, inputs = base_rate(dataset, since), None, None
    if spec.context or spec.bias:
        context, inputs = _context(dataset, spec, since)
    model = build_model(config, spec.tables(dataset), rate, torch.device("meta"), width, tasks, inputs)
    encoders = {
        name: _text_encoder(name, section, tokens[name], getattr(model, name), device)
        for name, section in text_sections(config)
    }
    share, encoder, live = config.item_llm.trained_share, encoders.get("item_llm"), None
    if encoder is not None and model.item_llm is not None:
        sampled = SubsampledEncoder(encoder, share, config.item_llm.refresh_after, config.seed) if share < 1 else None
        live = LiveItems(model.item_llm, sampled or encoder)
    if not takes_stored_items(config):
        model.item_source = live
    problems = [problem for name in encoders for problem in _vocabulary_problems(model, name, encoders[name])]
    if problems:
        raise ConfigError(problems)
    creatives = CreativeInputs.open(config, dataset, model)
    catalogue = None
    if reads_texts(config) or (compares_texts(config) and transitions is None):
        catalogue = frozen_catalogue(model, encoder, live, device)
    found = open_evidence(config, dataset, catalogue, evidence)
    flow = open_transitions(config, dataset, catalogue, transitions)
    if flow is not None:
        model.transitions = transition_similarity(config, flow, device)
    if found is not None and evidence is None:
        model.head.initialize_evidence(torch.from_numpy(found.model.weights), found.model.intercept)
    bases = base_fingerprints(model, config)  # before FSDP shards the weights
    wrapped = parallelize(model, config, device)
    initialize_tables(wrapped, config.seed, config.features.init_scale)
    torch.manual_seed(config.seed * 1_000_003 + dist.get_rank() + 1)  # dropout differs between ranks
    return Experiment(
        config,
        dataset,
        spec,
        device,
        wrapped,
        encoders,
        live,
        vectors,
        bases,
        factors,
        found,
        context,
        catalogue,
        creatives,
        flow,
    )


def _context(dataset: Dataset, spec: BatchSpec, since: int) -> tuple[RequestContext, ContextInputs]:
    """The context that a batch spec names, and the numbers by which a model reads it."""
    context, scales = fit_context(dataset, spec.context + spec.bias, since)
    return context, ContextInputs(scales.tolist(), {name: dataset.schema.sizes[name] for name in spec.bias})


def _text_encoder(
    name: str, section: ItemLLMConfig, tokens: TokenStore, llm: ItemLLM, device: torch.device
) -> ItemEncoder:
    return ItemEncoder(tokens, device, section.share_prefix and llm.shares_prefix, section.items_at_once, name)


def batch_spec_of(config: Config, dataset: Dataset) -> BatchSpec:
    """Return the batch spec of a configuration: the contents of its batches."""
    generates, objective = config.objective.generates, config.objective
    tasks = () if task_problems(objective, dataset.schema) else resolve_tasks(objective, dataset.schema)
    return BatchSpec(
        fusion=Fusion(config.objective.fusion),
        history=config.data.history,
        visibility=dataset.visibility,
        feedback_delay=config.data.feedback_delay,
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
        context=config.data.context,
        bias=objective.position_bias,
        tasks=() if not tasks or is_single(tasks, objective) else tuple(task.name for task in tasks),
        negative_rate=config.data.negative_rate,
    )


def _item_vectors(config: Config, dataset: Dataset, factors: RunFactors | None) -> NDArray[np.float32] | None:
    """[N, V] all dense item features, concatenated, or None; fitted if they do not exist yet. Collective."""
    names = config.data.item_vectors

    def read(name: str) -> NDArray[np.float32]:
        if name == FACTORS and factors is not None:
            return factors.fold_in(dataset).vectors()
        return item_vectors(dataset, name)

    # One process of each host fits the missing ones; the others then read its files.
    run_on_each_host(lambda: [item_vectors(dataset, name).shape for name in names if name != FACTORS or not factors])
    if not names:
        return None
    vectors = np.concatenate([read(name) for name in names], axis=1)
    if config.data.cold_dropout:
        vectors[dataset.training_item_counts() == 0] = 0
    return vectors


def _missing_models(config: Config) -> Iterator[str]:
    """Yield a message for a missing item store and each missing pretrained model.

    Checked here because Hugging Face would search for a missing directory on the network.
    """
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
    """Open the token store of the dataset's items for an LLM; build it if it does not exist. Collective.

    name: name of the section `item` of the configuration.

    Raises:
        ConfigError: the section has no tokeniser.
    """
    tokenizer = item.tokenizer or item.pretrained
    if tokenizer is None:
        raise ConfigError(f"{name}.tokenizer: none: an Item LLM from scratch still needs a tokeniser directory")

    form = text_format(name, item)

    def build() -> Path:
        return build_token_store(
            dataset,
            tokenizer,
            prompt=form.prompt,
            keys=list(item.text_keys),
            max_text_length=item.max_text_length,
            separator=item.separator,
            keep_end=form.keeps_end,
        )

    first = run_on_each_host(build)
    own = derived_path(dataset, "tokens", first.name)  # hosts that share no disk may have the dataset elsewhere
    return TokenStore.open(own if own.is_dir() else first)


def _vocabulary_problems(model: HLLM, name: str, encoder: ItemEncoder) -> Iterator[str]:
    """Yield a message if token ids or positions exceed the LLM's embedding tables (the lookup would crash)."""
    llm: ItemLLM = getattr(model, name)
    words, tokens = llm.backbone.get_input_embeddings().num_embeddings, encoder.tokens.facts["vocab_size"]
    if tokens > words:
        yield (
            f"{name}.tokenizer: makes token ids up to {tokens - 1}, but the Item LLM has {words} word vectors: give "
            "the tokeniser of that model, or a shape with a larger vocab_size"
        )
    learned = learned_positions(llm.backbone)
    # OPT's table has an offset that is no padding.
    used = llm.first_position + getattr(learned, "offset", 0)
    places = math.inf if learned is None else learned.num_embeddings - used
    own = int(llm.pooling == "item")
    longest = int(encoder.tokens.lengths.max())
    if longest + own > places:
        yield (
            f"{name}.max_text_length: the longest text has {longest} tokens{', and [ITEM] follows' * own}, but the "
            f"Item LLM has {places} position vectors: at most {places - own}"
        )
