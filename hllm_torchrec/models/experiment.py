"""`Experiment`: a configuration and a dataset on one rank, with the wrapped model, its encoders and its loaders."""

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
from hllm_torchrec.common.seconds import second_of
from hllm_torchrec.config.loading import to_dict
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator, possible_negatives
from hllm_torchrec.data.creative_loader import CreativeLoader
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.drawn_negatives import NegativeDraws
from hllm_torchrec.data.evidence import FILE as EVIDENCE_FILE
from hllm_torchrec.data.evidence import Evidence
from hllm_torchrec.data.item_factors import FACTORS
from hllm_torchrec.data.late_events import late_events
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.data.request_context import RequestContext
from hllm_torchrec.data.run_factors import FILE, RunFactors
from hllm_torchrec.data.stochastic_length import StochasticLength
from hllm_torchrec.data.transitions import FILE as TRANSITIONS_FILE
from hllm_torchrec.data.transitions import Transitions
from hllm_torchrec.distributed.collectives import all_gather_variable
from hllm_torchrec.distributed.wrappers import unwrap_model
from hllm_torchrec.models.creative_inputs import CreativeInputs
from hllm_torchrec.models.hard_candidates import retrieved_candidates
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import CachedItems, LiveItems, StoredItems
from hllm_torchrec.models.lora_base import check_base_weights, without_base_weights
from hllm_torchrec.models.run_evidence import EVIDENCE_KEY
from hllm_torchrec.models.run_transitions import TRANSITIONS_KEY
from hllm_torchrec.models.run_vocabulary import FACTORS_KEY, VOCABULARY, check_vocabulary, experiment_marks

CONTEXT_KEY = "context"
"""Key in a checkpoint's `extra.json`: ids of the context that occur in the run's training."""
LOOKUP_CHUNK = 65_536
"""Number of rows of a frozen item table that all ranks together look up per step."""
MEASURED_ITEMS, WHITENED_ITEMS, MEASURED_CHUNK = 1024, 16_384, 64
"""Number of items that `measure_item_statistics` encodes: in total, in total for whitening, and per call."""


@dataclass
class Experiment:
    """The parts of an experiment on this rank, built by `assembly.build_experiment`."""

    config: Config
    dataset: Dataset
    batch_spec: BatchSpec
    device: torch.device
    model: DistributedModelParallel
    text_encoders: dict[str, ItemEncoder]
    """Section of the configuration -> encoder, for the parts of the model that read text."""
    live_items: LiveItems | None
    item_vectors: NDArray[np.float32] | None
    base_fingerprints: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the weights that checkpoints do not contain: see `lora_base`."""
    factors: RunFactors | None = None
    """Item factors of the run, without those of new items; None: the run has no saved factors."""
    evidence: Evidence | None = None
    context: RequestContext | None = None
    """Context of requests that the model reads; None: it reads no context."""
    frozen_catalogue: Tensor | None = None
    """Embeddings [N, E] of all items by the frozen Item LLM, or from a store in serving; None: not computed."""
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
        """JSON values on the model's origin and inputs that checkpoints record. Collective at the first use."""
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

        Also restores the ids of the context that the checkpoint was trained with.

        Raises:
            ValueError: it was trained with different ids, item factors, evidence, transitions or base weights (LoRA).
        """
        check_vocabulary(self.config, self.dataset, checkpoint, also=["items"] if self.transitions else [])
        extra = read_checkpoint_json(checkpoint / "extra.json")
        check_base_weights(extra, self.base_fingerprints, self.config, checkpoint)
        if self.context is not None:
            self.context.restore(extra.get(CONTEXT_KEY, {}))
        factors = None if self.factors is None else self.factors.fingerprint
        if FACTORS in self.config.data.item_vectors and extra.get(FACTORS_KEY) != factors:
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
        """The encoder of the items' texts; None in an ID-only model."""
        return self.text_encoders.get("item_llm")

    def model_state(self) -> dict[str, Any]:
        """The model's tensors that a checkpoint contains: loading into them in place restores the model."""
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
        """Loader of a split's batches on this rank; in training, of the events that `data.train_part` selects.

        Outside of training, exposures see the history that `evaluation.history` selects (by default that of the
        scorer's requests); with visibility by position (leave one out), as much history as `max_history` allows.
        batch_item_tokens: see `data.batch_item_tokens`.
        """
        with_valid = training and split == "train" and self.config.data.train_part == "train_and_valid"
        # + 1: the [ITEM] token, which pooling "item" appends to each text; other poolings' costs are 1 too high.
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
            draws=self.draws(training),
        )
        since, late = second_of(data.train_since or 0) if training else 0, None
        if since and data.train_late_after is not None:
            late = late_events(self.dataset, data.dataset, data.train_late_after, since)
        spec = LoaderSpec(
            split="valid" if with_valid else split,
            batch_users=batch_users,
            max_history=longest,
            seed=self.config.seed,
            shuffle=training,
            batch_cost=batch_item_tokens,
            item_costs=costs,
            all_events=with_valid,
            extend_history=not training and by_position,
            as_requests=not training and not by_position and self.config.evaluation.history == "request",
            since=since,
            late=late,
            user_share=data.train_users if training else 1.0,
            prefetch=data.prefetch,
            timeout=self.config.parallel.timeout,
        )
        return Loader(self.dataset, collator, spec, dist.get_rank(), dist.get_world_size())

    def request_collator(self, spec: BatchSpec | None = None) -> Collator:
        """Collator of requests, without the evidence of exposures; spec: instead of the experiment's batch spec."""
        return Collator(self.dataset, spec or self.batch_spec, item_vectors=self.item_vectors, context=self.context)

    def draws(self, training: bool) -> NegativeDraws | None:
        """Negatives to add to a loader's exposures, or None; outside of training uniform and the same for all runs."""
        drawn = self.config.data.drawn_negatives
        if not drawn.count:
            return None
        items = possible_negatives(self.dataset)
        items = np.arange(1, self.dataset.num_items) if items is None else items
        if not training:
            return NegativeDraws(self.dataset, items, "uniform", self.config.evaluation.drawn_negatives)
        candidates = None
        if drawn.item_store is not None and drawn.user_store is not None:
            candidates = retrieved_candidates(self.dataset, items, drawn.item_store, drawn.user_store, drawn.top)
        return NegativeDraws(self.dataset, items, drawn.by, drawn.count, self.config.seed, candidates)

    def creative_loader(
        self, split: str, per_batch: int, *, training: bool = False, max_history: int | None = None
    ) -> CreativeLoader:
        """Loader of the creatives of a split on this rank; see `CreativeInputs.loader`."""
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
        """Mask [N] of the items without a training event."""
        return self.dataset.training_item_counts() == 0

    def encode_catalogue(self) -> Tensor | None:
        """Embeddings [N, E] of all items with the current weights; None in an ID-only model. Collective.

        A frozen catalogue is returned as it is; stored item embeddings are looked up in the frozen table.
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
        """Encode the catalogue with the current weights and make the model use these embeddings. Collective."""
        catalogue = self.encode_catalogue()
        if catalogue is not None:
            self.hllm.item_source = CachedItems(catalogue)

    @contextmanager
    def evaluation_items(self) -> Iterator[None]:
        """Context manager: inside, a model with live item embeddings uses a cache of the catalogue. Collective."""
        source = self.hllm.item_source
        if self.hllm.encodes_items:
            self.use_cached_items()
        try:
            yield
        finally:
            self.hllm.item_source = source

    @torch.no_grad()
    def measure_item_statistics(self) -> dict[str, float]:
        """Fit the model's `Standardize` or `Whiten` to evenly spaced items of the catalogue. Collective.

        Returns:
            `length`, the mean L2 norm, and `common`, the L2 norm of the mean embedding.
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
        """[N, E] rows of the frozen table, looked up in blocks that are divided between the ranks."""
        world, rank = dist.get_world_size(), dist.get_rank()
        blocks = torch.arange(self.dataset.num_items, device=self.device).split(LOOKUP_CHUNK)
        # Contiguous parts in rank order, so that the gathered rows are in id order. A rank's part may be empty.
        parts = (self.hllm.embed_items(block.tensor_split(world)[rank]) for block in blocks)
        return torch.cat([all_gather_variable(part) for part in parts])
