"""The hybrid HLLM: Item LLM -> (+ ID and time features) -> user encoder -> prediction and generation.

    E_u = ItemLLM(text_u)                                  each unique item of the global batch once
    x_i = P(E_i) + ID_i + action_i + MLP(time_i)           sum-pooled, appendix A
    h, q = UserEncoder(x, queries)                         one pass per user for all exposures
    logit = Head(q) or Head(q, x_target)                   early or late fusion, Figure 2
    L = lambda * L_gen(h, E_next, E_negatives) + L_cls     Eq. (1)-(3)

E_next and E_negatives are the Item LLM's embeddings or, in the item space "features", the sum P(E) + ID + ... of each
item, which is computed in the same table lookup as the other slots. An ID-only model always uses the space "features".

Legend: B pieces of users, T history positions, Q queries, X exposures, G generative targets, U unique items,
S feature slots (T, Q, then X for late fusion, then U for the item space of features), D user width, E item width,
V width of the dense item features, F numeric features, O outputs of all tasks, R rank of the transitions, N creatives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.common.errors import configured_by
from hllm_torchrec.config.rules import LLM_SECTIONS
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.event_schema import LabelColumn
from hllm_torchrec.models.creative_head import CreativeHead, CreativeLosses
from hllm_torchrec.models.hllm_output import HLLMOutput
from hllm_torchrec.models.item_source import CachedItems, ItemSource
from hllm_torchrec.models.named_backbones import NamedBackbone
from hllm_torchrec.models.slot_layout import SlotLayout
from hllm_torchrec.models.tasks import Task, binary_outputs, is_single, task_losses
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM, PackedTexts
from hllm_torchrec.modules.encoders.base import Queries, UserEncoder
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.features.adapter import Adapter
from hllm_torchrec.modules.features.hybrid import HybridFeatures
from hllm_torchrec.modules.features.liked_texts import LikedTexts
from hllm_torchrec.modules.features.standardize import Standardize, Whiten
from hllm_torchrec.modules.features.text_similarity import TextSimilarity
from hllm_torchrec.modules.features.transition_similarity import TransitionSimilarity
from hllm_torchrec.modules.fusion import Fusion
from hllm_torchrec.modules.heads import PredictionHead
from hllm_torchrec.modules.jagged import sequence_of_position
from hllm_torchrec.modules.losses.objectives import Exclusion, InfoNceOutput, LogitScale, binary_cross_entropy, info_nce
from hllm_torchrec.modules.losses.sampled_bce import sampled_bce
from hllm_torchrec.modules.losses.task_losses import TaskLoss
from hllm_torchrec.modules.position_bias import PositionBias
from hllm_torchrec.modules.precision import widen
from hllm_torchrec.modules.task_towers import TaskTowers

GENERATIVE_LOSSES = {"infonce": info_nce, "bce": sampled_bce}


@dataclass(frozen=True)
class ContextInputs:
    """Scales and sizes of the context of requests, as inputs of a model.

    scales: (mean, standard deviation) in training of each numeric context column; bias_rows: {context of the position
    bias: number of ids}.
    """

    scales: Sequence[Sequence[float]] = ()
    bias_rows: Mapping[str, int] = field(default_factory=dict)


class HLLM(nn.Module):
    """Hybrid HLLM, assembled from modules by `build_model`; its code does not depend on ranks, devices or optimizers.

    Args:
        item_llm: None for an ID-only model.
        item_width: E.
        features, user: hybrid features and user encoder, both of width D.
        config: configuration of the experiment.
        base_rate: probability at which the head of a single task starts; see `build_model`.
        vector_width: V; 0 if there are no dense item features.
        evidence: number of evidence columns per exposure.
        tasks: labels to predict, starting with the first label; None: only the first label.
        context: scales and sizes of the context of requests; None: no context.
        creative: the LLM that writes texts for users, or None.
    """

    def __init__(
        self,
        item_llm: ItemLLM | None,
        item_width: int,
        features: HybridFeatures,
        user: UserEncoder,
        config: Config,
        base_rate: float,
        vector_width: int = 0,
        evidence: int = 0,
        tasks: Sequence[Task] | None = None,
        context: ContextInputs | None = None,
        creative: CreativeLLM | None = None,
    ) -> None:
        super().__init__()
        objective, context = config.objective, context or ContextInputs()
        if context.scales:
            self.register_buffer("context_scales", torch.tensor(context.scales, dtype=torch.float32))
            self.context_scales: Tensor
        self.numeric_context = len(context.scales)
        self.tasks = tuple(tasks or (Task(LabelColumn("label")),))
        build_head = partial(
            PredictionHead, user.width, objective.head_hidden, objective.head_dropout, objective.fusion, evidence
        )
        self.config = config
        self.fusion = Fusion(objective.fusion)
        self.generates = objective.generates
        self.item_llm, self.features, self.user = item_llm, features, user
        self.compares_features = self.generates and item_space(config) == "features"
        self.project_vectors = nn.Linear(vector_width, user.width, bias=False) if vector_width else None
        same = item_llm is None or item_width == user.width
        self.project_item = nn.Identity() if same else nn.Linear(item_width, user.width)
        self.standardise: Standardize | Whiten | None = None
        if item_llm is not None and (config.item_llm.standardise or config.item_llm.whiten):
            self.standardise = Whiten(item_width) if config.item_llm.whiten else Standardize(item_width)
        if self.fusion.query_is_user:
            self.user_token = nn.Parameter(torch.randn(user.width) * 0.02)
        if self.fusion.has_queries:
            self._build_heads(build_head, base_rate, user.width, evidence)
        bias_rows = context.bias_rows
        self.position_bias = PositionBias(bias_rows, binary_outputs(self.tasks)) if bias_rows else None
        self.value_head = build_head() if self.fusion.has_queries and objective.value_weight > 0 else None
        if self.generates:
            self._build_generation(straight=same or self.compares_features, item_width=item_width)
        self.text_similarity: TextSimilarity | None = None
        if objective.text_similarity and item_llm is not None:
            self.text_similarity = TextSimilarity(objective.text_similarity, objective.text_decay)
        self.transitions: TransitionSimilarity | None = None
        """Set by `assembly.build_experiment` if `objective.transitions` is above 0."""
        self.slots = SlotLayout(self.fusion, config.user.actions == "interleaved", self.compares_features)
        rank = config.item_llm.adapter
        self.adapter = Adapter(item_width, rank) if rank and item_llm is not None else None
        self.creative = creative
        self.creative_head: CreativeHead | None = None
        self.liked_texts: LikedTexts | None = None
        if creative is not None:
            self._build_creative(creative, item_width)
        self.item_source: ItemSource | None = None
        """Source of item embeddings; None in an ID-only model."""

    def _build_heads(
        self, build_head: Callable[[], PredictionHead], base_rate: float, width: int, evidence: int
    ) -> None:
        """Build the head of a single task (`is_single`), else task towers with the tasks' scales and uncertainties."""
        objective = self.config.objective
        self.head: PredictionHead | TaskTowers
        if is_single(self.tasks, objective):
            self.head = build_head()
            self.head.initialize_bias(base_rate)
            return
        self.head = TaskTowers(
            width,
            objective.head_hidden,
            [task.outputs for task in self.tasks],
            objective.head_dropout,
            objective.fusion,
            evidence,
            objective.experts if objective.towers == "mmoe" else 0,
        )
        self.head.initialize_bias([value for task in self.tasks for value in task.start])
        scales = torch.tensor([[task.center, task.scale] for task in self.tasks])
        self.register_buffer("task_scales", scales)
        self.task_scales: Tensor
        if objective.task_weighting == "uncertainty":
            self.task_log_variances = nn.Parameter(torch.zeros(len(self.tasks)))

    def _build_generation(self, *, straight: bool, item_width: int) -> None:
        """Build the parts of the generative loss; straight: hidden states are compared with items as they are."""
        objective = self.config.objective
        self.project_next = nn.Identity() if straight else nn.Linear(self.user.width, item_width)
        self.generative_loss = GENERATIVE_LOSSES[objective.generative_loss]
        if objective.mask_cosine_above is not None:
            self.generative_loss = partial(info_nce, cosine_above=objective.mask_cosine_above)
        self.logit_scale = LogitScale(objective.temperature)
        self.mask_own_items = objective.mask_own_items

    def _build_creative(self, creative: CreativeLLM, item_width: int) -> None:
        """Build the parts of the losses of personalized texts."""
        section = self.config.creative
        if section.soft.text_decay:
            self.liked_texts = LikedTexts(section.soft.text_decay, *self.features.history_actions)
        self.creative_head = CreativeHead(
            section, self.user_vector_width, item_width, creative.width, creative.word_scale
        )

    def forward(self, batch: HybridBatch, want_next: bool = False) -> HLLMOutput:
        """Forward pass of one step; want_next: also return the predicted next item of every exposure (evaluation)."""
        items = self.item_embeddings(batch.unique_items)
        h_TD, q_QD, target_XD, of_features = self._encode_users(batch, items)
        compared = of_features if self.compares_features else items
        logits, outputs, tasks, value_error = self._classify(batch, q_QD, target_XD)
        # Adding 0 times all outputs makes a rank without samples take part in every collective of the backward pass.
        nothing = 0.0 * sum(x.sum() for x in (h_TD, items, of_features) if x is not None)
        first = self.tasks[0].name
        tasks[first] = tasks[first]._replace(trained=tasks[first].trained + nothing)
        return HLLMOutput(
            logits=logits,
            outputs=outputs,
            tasks=tasks,
            value_error=value_error,
            generative=(
                self._generate(batch, h_TD, compared) if compared is not None and self._has_targets(batch) else None
            ),
            next_items=self._next_items(batch, h_TD, items) if want_next and self.generates else None,
            items=None if compared is None else compared.detach(),
            creative=self._write(batch, h_TD, q_QD, items) if batch.creative is not None else None,
        )

    def named_backbones(self) -> list[NamedBackbone]:
        """Those of the large parts (Item LLM, user encoder, Creative LLM) that this model has."""
        modules = ((name, getattr(self, name)) for name in LLM_SECTIONS)
        return [
            NamedBackbone(name, module, getattr(self.config, name), getattr(self.config.optim, f"{name}_lr"))
            for name, module in modules
            if module is not None
        ]

    def item_embeddings(self, unique_items: Tensor) -> Tensor | None:
        """E [U, E] of the batch's items from the model's `item_source`, or None in an ID-only model."""
        if self.item_llm is None:
            return None
        assert self.item_source is not None, "the model was not given a source of item embeddings"
        return self.item_source(unique_items)

    @property
    def has_one_logit(self) -> bool:
        """True if the head returns logits [X], False if it returns outputs [X, O] (task towers)."""
        return not isinstance(getattr(self, "head", None), TaskTowers)

    @property
    def encodes_items(self) -> bool:
        """True if a step computes item vectors with current weights: of the Item LLM, or of the features (ID-only)."""
        return self.item_source is None or self.item_source.is_live

    def embed_items(self, item_ids: Tensor, source: ItemSource | None = None) -> Tensor:
        """E [n, E] of items outside of a step, from `source` (None: the model's `item_source`). Collective.

        Under FSDP2 this method is registered as a forward method, so that calling it gathers the weights.
        """
        source = source or self.item_source
        assert source is not None, "an ID-only model has no item embeddings"
        return source(item_ids)

    def embed_in_feature_space(
        self, features: KeyedJaggedTensor, item_ids: Tensor, vectors: Tensor | None, joined: bool = False
    ) -> Tensor:
        """P(E) + ID + item features [n, D] of items with the current weights, outside of a step. Collective.

        features: n slots, from `Collator.item_features`; vectors: [n, V] the items' dense features, or None; joined:
        return the vectors that are compared with users, which include texts and transitions (`joined`), instead of the
        inputs of the user encoder.
        """
        items = self.item_embeddings(item_ids)
        found = self.features(features, None, self._projected(items, vectors))
        if not joined:
            return found
        texts = None if self.text_similarity is None or items is None else self.text_embeddings(item_ids, items)
        return self.joined(found, texts, None if self.transitions is None else self.transitions.items(item_ids))

    def joined(self, learned: Tensor, texts: Tensor | None, transitions: Tensor | None) -> Tensor:
        """Concatenate vectors of users or items [n, D] with texts [n, E] and transitions [n, R + 1], if not None.

        The parts are normalized so that all items get the same norm.
        """
        if texts is not None:
            assert self.text_similarity is not None
            learned = self.text_similarity.join(learned, texts)
        elif transitions is not None:
            learned = nn.functional.normalize(widen(learned), dim=-1)
        return learned if transitions is None else torch.cat([learned, transitions], dim=-1)

    @property
    def user_vector_width(self) -> int:
        """Width of the vectors of `embed_users`: D or E, plus the widths that `joined` or `liked_texts` adds."""
        project = self.project_next if self.generates and not self.fusion.query_is_user else None
        added = 0 if self.liked_texts is None or self.item_llm is None else self.item_llm.width
        if self.text_similarity is not None and self.item_llm is not None and project is not None:
            added = self.item_llm.width
        if self.transitions is not None and project is not None:
            added += self.transitions.width
        return added + (project.out_features if isinstance(project, nn.Linear) else self.user.width)

    def embed_users(self, batch: HybridBatch) -> Tensor:
        """User embeddings [Q, `user_vector_width`], one per query of the batch, outside of a step. Collective.

        Late fusion: the output of the [USER] query and, with `creative.soft.text_decay`, the mean text of what the user
        liked. Otherwise the hidden state of the last position that the query sees, projected and joined as for the
        generative loss if the model has one; zeros if the query sees no position.
        """
        items = self.item_embeddings(batch.unique_items)
        h_TD, q_QD, _, _ = self._encode_users(batch, items)
        return self._user_vectors(batch, h_TD, q_QD, items)

    def _user_vectors(self, batch: HybridBatch, h_TD: Tensor, q_QD: Tensor, items: Tensor | None) -> Tensor:
        """The result of `embed_users`; items: E [U, E] of the unique items."""
        if self.fusion.query_is_user:
            if self.liked_texts is None or items is None:
                return q_QD
            row = self._last_rows(batch)
            texts = self.liked_texts(items[batch.history_index], batch.seq_offsets, batch.features, row.clamp(min=0))
            return torch.cat([q_QD, (texts * (batch.query_visible > 0)[:, None]).to(q_QD.dtype)], 1)
        every = torch.arange(batch.query_times.numel(), device=batch.query_times.device)
        sums = self._history_sums(batch, items)
        return self._last_visible(batch, h_TD, sums, every, self.project_next if self.generates else nn.Identity())

    def _last_rows(self, batch: HybridBatch) -> Tensor:
        """Index [Q], among the T positions, of the last one that each query sees.

        A query that sees none has an invalid index: -1, or a position of the piece before.
        """
        piece = sequence_of_position(batch.query_offsets, batch.query_times.numel())
        return batch.seq_offsets[piece] + batch.query_visible - 1

    def _write(self, batch: HybridBatch, h_TD: Tensor, q_QD: Tensor, items: Tensor | None) -> CreativeLosses:
        """Losses of the batch's creatives; each creative is a query in the forward pass of its user."""
        assert self.creative is not None and self.creative_head is not None
        losses: CreativeLosses = self.creative_head(
            self.creative, self._user_vectors(batch, h_TD, q_QD, items), items, batch
        )
        return losses

    def score_texts(self, users: Tensor, is_null: Tensor, texts: PackedTexts) -> Tensor:
        """Negative log-likelihoods [N] of responses given vectors of users, outside of a step. Collective.

        users: [N, `user_vector_width`]; is_null: [N] bool, True where the learned null tokens replace the soft tokens
        of the user's vector.
        """
        assert self.creative is not None and self.creative_head is not None
        return self.creative_head.write(self.creative, users, is_null, texts).nll

    @property
    def needs_user_statistics(self) -> bool:
        """True if statistics for the soft prompt (of user vectors, or of liked texts) have not been measured yet."""
        unknown = self.liked_texts is not None and not bool(self.liked_texts.measured)
        return unknown or (self.creative_head is not None and self.creative_head.needs_statistics)

    @property
    def needs_item_statistics(self) -> bool:
        """True if item embeddings are standardised or whitened and their statistics have not been measured yet."""
        return self.standardise is not None and not bool(self.standardise.measured)

    def _encode_users(
        self, batch: HybridBatch, items: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(h [T, D], q [Q, D], target features [X, D] if late fusion else None, item features [U, D] or None)."""
        x_TD, x_QD, target_XD, item_UD = self.slot_features(batch, items)
        of_items = item_UD if self.slots.has_items(batch) else None
        queries = None
        if self.fusion.has_queries:
            queries = Queries(x_QD, batch.query_offsets, batch.query_visible, batch.query_times)
        with configured_by("user.shape", length="data.max_history"):
            h_TD, q_QD = self.user(x_TD, batch.seq_offsets, batch.timestamps, queries, batch.next_times)
        return h_TD, q_QD, target_XD if self.fusion.query_is_user else None, of_items

    def slot_features(self, batch: HybridBatch, items: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input vectors of the user encoder and the heads, by kind of slot; items: E [U, E] of the unique items.

        Returns history [T, D], queries [Q, D] (late fusion: with the [USER] vector added), targets [X, D] (without late
        fusion [0, D]) and items [U, D] (without item slots [0, D]). Features of a slot depend only on the slot.
        """
        numbers = self.standardized_numbers(batch.numeric)
        projected = self._projected(items, batch.item_vectors)
        of_slots = None if projected is None else self.slots.item_vectors(batch, projected)
        slots = self.features(batch.features, numbers, of_slots)
        x_TD, x_QD, target_XD, item_UD = slots.tensor_split(self.slots.bounds(batch))
        if self.fusion.query_is_user:
            x_QD = x_QD + self.user_token
        return x_TD, x_QD, target_XD, item_UD

    def standardized_numbers(self, numeric: Tensor | None) -> Tensor | None:
        """Numeric inputs [S, F] with the numeric context (the last columns) standardized, and 0 where it is unknown."""
        if numeric is None or not self.numeric_context:
            return numeric
        plain, context = numeric[:, : -self.numeric_context], numeric[:, -self.numeric_context :]
        center, scale = self.context_scales.T
        return torch.cat([plain, ((context - center) / scale).nan_to_num()], dim=1)

    def biased(self, logits: Tensor, batch: HybridBatch | None = None) -> Tensor:
        """Add the position bias of the binary tasks to logits [X], or to the outputs [X, O] of several tasks.

        In training, the bias of each exposure's context is added; otherwise the constant level of `PositionBias`.
        """
        if self.position_bias is None:
            return logits
        ids = weights = None
        if self.training:
            assert batch is not None
            binary = [number for number, task in enumerate(self.tasks) if task.is_binary]
            ids = batch.bias_ids
            weights = batch.weights[:, None] if batch.task_weights is None else batch.task_weights[:, binary]
        outputs = logits[:, None] if self.has_one_logit else logits
        return self.position_bias(outputs, ids, weights).view_as(logits)

    def _projected(self, items: Tensor | None, vectors: Tensor | None) -> Tensor | None:
        """P(E) + W v [n, D] from E [n, E] and dense features v [n, V] of items; None if the model has neither."""
        terms = [] if items is None else [self._project(items)]
        if self.project_vectors is not None:
            assert vectors is not None, "the batch has no item vectors"
            terms.append(self.project_vectors(vectors))
        if not terms:
            return None
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def _project(self, items: Tensor) -> Tensor:
        """P(E) of E [n, E]; E is standardised or whitened first if this is configured."""
        if isinstance(self.standardise, Whiten) and isinstance(self.project_item, nn.Linear):
            return self.standardise(items, self.project_item)
        return self.project_item(items if self.standardise is None else self.standardise(items))

    def text_embeddings(self, item_ids: Tensor, items: Tensor) -> Tensor:
        """E [n, E] of items, standardised or whitened if this is configured, without the projection P."""
        if self.standardise is None:
            return items
        if isinstance(self.item_source, CachedItems):
            return self.item_source.through(self.standardise, item_ids)
        return self.standardise(items)

    def _history_sums(self, batch: HybridBatch, items: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(decayed sums of the history's texts [T, E] or None, decayed sums of its transitions [T, R + 1] or None)."""
        texts = transitions = None
        if self.text_similarity is not None and items is not None:
            texts = self.text_embeddings(batch.unique_items, items)[batch.history_index]
            texts = self.text_similarity.history(texts, batch.seq_offsets)
        if self.transitions is not None and self.generates:
            transitions = self.transitions.history(batch.item_ids, batch.seq_offsets)
        return texts, transitions

    def _classify(
        self, batch: HybridBatch, q_QD: Tensor, target_XD: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, TaskLoss], Tensor | None]:
        """(logits [X], outputs [X, O] or None, losses by task (Eq. 2), squared error of the value head or None).

        The offset for subsampled negatives is added only in the loss; the returned logits and outputs are calibrated on
        the complete traffic.
        """
        first = self.tasks[0].name
        if not self.fusion.has_queries:
            nothing = q_QD.new_zeros(())
            return batch.labels.new_empty(0), None, {first: TaskLoss(nothing, nothing)}, None
        inputs = q_QD[batch.target_query], target_XD, batch.evidence
        if isinstance(self.head, TaskTowers):
            outputs = self.biased(self.head(*inputs), batch)
            uncertain = self.config.objective.task_weighting == "uncertainty"
            log_variances = self.task_log_variances if uncertain else None
            losses = task_losses(self.tasks, batch, outputs, self.task_scales, log_variances)
            return outputs[:, 0], outputs, losses, None
        logits = self.biased(self.head(*inputs), batch)
        trained = logits if batch.logit_offset is None else logits + batch.logit_offset
        loss = binary_cross_entropy(trained, batch.labels, batch.weights)
        tasks = {first: TaskLoss(loss.detach(), loss)}
        if self.value_head is None:
            return logits, None, tasks, None
        known = ~torch.isnan(batch.target_values)  # NaN: the exposure has no value, and must not affect the gradients
        error = self.value_head(*inputs)[known] - batch.target_values[known]
        return logits, None, tasks, (error.square() * batch.weights[known]).sum()

    def _has_targets(self, batch: HybridBatch) -> bool:
        """True if the generative loss is computed; a batch of creatives has no targets on any rank."""
        return self.generates and batch.creative is None

    def _generate(self, batch: HybridBatch, h_TD: Tensor, items: Tensor) -> InfoNceOutput:
        """Generative loss, Eq. (1), of the next items; items: [U, E], or [U, D] in the item space "features"."""
        exclude = None
        if self.mask_own_items:
            # A user's other items must not be negatives of the next item, so each prediction excludes all items of
            # the full history of its piece, including events that Stochastic Length removed.
            sequences = sequence_of_position(batch.seq_offsets, batch.item_ids.numel())
            exclude = Exclusion(*batch.full_history, sequences[batch.next_rows])
        return self.generative_loss(
            self.project_next(h_TD[batch.next_rows]),
            items[batch.next_index],
            items[batch.negative_index],
            self.logit_scale(),
            target_ids=batch.next_items,
            negative_ids=batch.negative_items,
            exclude=exclude,
        )

    def _next_items(self, batch: HybridBatch, h_TD: Tensor, items: Tensor | None) -> Tensor:
        """Predicted next item of each exposure, from the last position that it sees; zeros if it sees none.

        Shape [X, width of the compared item vectors]: E or D, plus the widths that `joined` adds.
        """
        sums = self._history_sums(batch, items)
        return self._last_visible(batch, h_TD, sums, batch.target_query, self.project_next)

    def _last_visible(
        self,
        batch: HybridBatch,
        h_TD: Tensor,
        sums: tuple[Tensor | None, Tensor | None],
        queries: Tensor,
        project: nn.Module,
    ) -> Tensor:
        """Projected hidden state of the last position that each of `queries` [n] sees; zeros if it sees none.

        The state is `joined` with `sums` (the result of `_history_sums`) at that position.
        """
        # An invalid row (visible = 0) is clamped, and its result is multiplied by 0.
        visible, row = batch.query_visible[queries], self._last_rows(batch)[queries]
        if h_TD.shape[0] == 0:  # no row to index; `project` still runs so that its weights get (zero) gradients
            h_TD, row = h_TD.new_zeros(1, h_TD.shape[1]), row * 0
            texts, transitions = (x if x is None else x.new_zeros(1, x.shape[1]) for x in sums)
        else:
            texts, transitions = sums
        at = row.clamp(min=0)
        texts, transitions = (x if x is None else x[at] for x in (texts, transitions))
        found = self.joined(project(h_TD[at]), texts, transitions)
        return found * (visible > 0)[:, None]


def item_space(config: Config) -> str:
    """Space in which the generative loss compares items: "text" (E) or "features" (P(E) + ID + ...)."""
    chosen = config.objective.item_space
    if chosen != "auto":
        return chosen
    return "text" if config.item_llm.enabled else "features"
