"""The hybrid HLLM: Item LLM -> (+ ID and time features) -> user encoder -> prediction and generation.

    E_u = ItemLLM(text_u)                                  each unique item of the global batch once
    x_i = P(E_i) + ID_i + action_i + MLP(time_i)           sum-pooled, appendix A
    h, q = UserEncoder(x, queries)                         one pass per user for all exposures
    logit = Head(q) or Head(q, x_target)                   early or late fusion, Figure 2
    L = lambda * L_gen(h, E_next, E_negatives) + L_cls     Eq. (1)-(3)

Legend: B pieces of users, T history positions, Q queries, X exposures, G generative targets, U unique items,
S feature slots (T, Q, then X for late fusion), D user width, E item width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hllm_torchrec.config import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.modules.hybrid_features import ACTION_GATE, HybridFeatures
from hllm_torchrec.modules.item_llm import ItemLLM, build_backbone
from hllm_torchrec.modules.jagged import sequence_of_position
from hllm_torchrec.modules.losses import Exclusion, InfoNceOutput, LogitScale, binary_cross_entropy, info_nce
from hllm_torchrec.modules.prediction_head import PredictionHead
from hllm_torchrec.modules.user_llm import Queries, UserLLM

EncodeItems = Callable[[ItemLLM, Tensor], Tensor]
"""(item_llm, unique item ids [U]) -> E [U, E]; where items of a global batch are shared out over ranks."""


@dataclass
class HLLMOutput:
    """What a step yields. Sums, not means: ranks hold different numbers of exposures.

    logits: [X] (empty without fusion); classification: [] weighted sum of the BCE; value_error: [] weighted sum
    of squared errors of the auxiliary head, or None; generative: the InfoNCE's sums, or None; next_items:
    [X, E] predicted item of every exposure, or None; items: [U, E] detached.
    """

    logits: Tensor
    classification: Tensor
    value_error: Tensor | None
    generative: InfoNceOutput | None
    next_items: Tensor | None
    items: Tensor | None


class HLLM(nn.Module):
    """Assembled from modules by `build_model`; knows nothing of ranks, devices or optimizers.

    Args:
        item_llm: None for an ID-only model.
        item_width: E.
        features, user: hybrid features and user encoder, both D wide.
        config: the experiment.
        base_rate: share of positive labels in training, where the head's bias starts.
        vector_width: V of the dense item features, 0 without.
    """

    def __init__(
        self,
        item_llm: ItemLLM | None,
        item_width: int,
        features: HybridFeatures,
        user: UserLLM,
        config: Config,
        base_rate: float,
        vector_width: int = 0,
    ) -> None:
        super().__init__()
        objective = config.objective
        self.fusion = objective.fusion
        self.generates = self.fusion == "none" or objective.generative_weight > 0
        self.item_llm, self.features, self.user = item_llm, features, user
        self.project_vectors = nn.Linear(vector_width, user.width, bias=False) if vector_width else None
        same = item_llm is None or item_width == user.width
        self.project_item = nn.Identity() if same else nn.Linear(item_width, user.width)
        if self.fusion == "late":
            self.user_token = nn.Parameter(torch.randn(user.width) * 0.02)
        if self.fusion != "none":
            self.head = PredictionHead(user.width, objective.head_hidden, objective.head_dropout, self.fusion)
            self.head.initialise_bias(base_rate)
        self.value_head: PredictionHead | None = None
        if self.fusion != "none" and objective.value_weight > 0:
            self.value_head = PredictionHead(user.width, objective.head_hidden, objective.head_dropout, self.fusion)
        if self.generates:
            self.project_next = nn.Identity() if same else nn.Linear(user.width, item_width)
            self.logit_scale = LogitScale(objective.temperature)
        self.encode_items: EncodeItems | None = None
        self.item_cache: Tensor | None = None

    def forward(self, batch: HybridBatch, want_next: bool = False) -> HLLMOutput:
        """One step; `want_next` also returns the predicted next item of every exposure (evaluation)."""
        items = self.item_embeddings(batch.unique_items)
        h_TD, q_QD, target_XD = self._encode_users(batch, items)
        logits, classification, value_error = self._classify(batch, q_QD, target_XD)
        # A rank without samples still takes part in every backward collective.
        classification = classification + 0.0 * (h_TD.sum() if items is None else h_TD.sum() + items.sum())
        return HLLMOutput(
            logits=logits,
            classification=classification,
            value_error=value_error,
            generative=self._generate(batch, h_TD, items) if self.generates and items is not None else None,
            next_items=self._next_items(batch, h_TD) if want_next and self.generates else None,
            items=None if items is None else items.detach(),
        )

    def item_embeddings(self, unique_items: Tensor) -> Tensor | None:
        """E of the batch's items [U, E]: from the cache, from the Item LLM, or None in an ID-only model."""
        if self.item_llm is None:
            return None
        if self.item_cache is not None:
            return self.item_cache[unique_items]
        return self._encode_items(self.item_llm, unique_items)

    def embed_items(self, item_ids: Tensor) -> Tensor:
        """E of items [n, E] by the present weights, outside of a step. Under FSDP2 a forward pass of its own."""
        assert self.item_llm is not None, "an ID-only model has no item embeddings"
        return self._encode_items(self.item_llm, item_ids)

    def _encode_items(self, item_llm: ItemLLM, item_ids: Tensor) -> Tensor:
        assert self.encode_items is not None, "the model was not given a way to encode items"
        return self.encode_items(item_llm, item_ids)

    def _encode_users(self, batch: HybridBatch, items: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """h [T, D], q [Q, D] and, for late fusion, the targets' features [X, D]."""
        slots = self.features(batch.features, batch.numeric, self._items_of_slots(batch, items))
        x_TD, x_QD, target_XD = slots.tensor_split(self._slot_bounds(batch))
        if self.fusion == "none":
            h_TD, q_QD = self.user(x_TD, batch.seq_offsets, batch.timestamps)
            return h_TD, q_QD, None
        late = self.fusion == "late"
        if late:
            x_QD = x_QD + self.user_token
        asked = Queries(x_QD, batch.query_offsets, batch.query_visible, batch.query_times)
        h_TD, q_QD = self.user(x_TD, batch.seq_offsets, batch.timestamps, asked)
        return h_TD, q_QD, target_XD if late else None

    def _items_of_slots(self, batch: HybridBatch, items: Tensor | None) -> Tensor | None:
        """P(E) + W v of each slot's item [S, D]: history, then queries (early) or nothing and the targets (late)."""
        terms = [] if items is None else [self.project_item(items)]
        if self.project_vectors is not None:
            assert batch.item_vectors is not None, "the batch has no item vectors"
            terms.append(self.project_vectors(batch.item_vectors))
        if not terms:
            return None
        projected = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        history = projected[batch.history_index]
        if self.fusion == "none":
            return history
        targets = projected[batch.target_index]
        if self.fusion == "early":
            return torch.cat([history, targets[batch.query_target]])
        return torch.cat([history, history.new_zeros(batch.query_times.numel(), history.shape[1]), targets])

    def _slot_bounds(self, batch: HybridBatch) -> tuple[int, int]:
        history = batch.item_ids.numel()
        return history, history + (0 if self.fusion == "none" else batch.query_times.numel())

    def _classify(
        self, batch: HybridBatch, q_QD: Tensor, target_XD: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits [X], the sum of Eq. (2), and the sum of squared errors of the auxiliary value head."""
        if self.fusion == "none":
            return batch.labels.new_empty(0), q_QD.new_zeros(()), None
        inputs = (q_QD[batch.target_query],) if target_XD is None else (q_QD[batch.target_query], target_XD)
        logits = self.head(*inputs)
        classification = binary_cross_entropy(logits, batch.labels, batch.weights)
        if self.value_head is None:
            return logits, classification, None
        known = ~torch.isnan(batch.target_values)
        error = self.value_head(*inputs)[known] - batch.target_values[known]
        return logits, classification, (error.square() * batch.weights[known]).sum()

    def _generate(self, batch: HybridBatch, h_TD: Tensor, items: Tensor) -> InfoNceOutput:
        """Eq. (1): positives are E of the next items, without ID or time; own items are no negatives."""
        sequences = sequence_of_position(batch.seq_offsets, batch.item_ids.numel())
        return info_nce(
            self.project_next(h_TD[batch.next_rows]),
            items[batch.next_index],
            items[batch.negative_index],
            self.logit_scale(),
            target_ids=batch.next_items,
            negative_ids=batch.negative_items,
            exclude=Exclusion(batch.item_ids, batch.seq_offsets, sequences[batch.next_rows]),
        )

    def _next_items(self, batch: HybridBatch, h_TD: Tensor) -> Tensor:
        """Predicted next item [X, E] by the last position that an exposure sees; zeros where it sees none."""
        piece = sequence_of_position(batch.query_offsets, batch.query_times.numel())
        visible = batch.query_visible[batch.target_query]
        row = batch.seq_offsets[piece[batch.target_query]] + visible - 1
        if h_TD.shape[0] == 0:
            return self.project_next(h_TD.new_zeros(row.numel(), h_TD.shape[1])) * 0
        return self.project_next(h_TD[row.clamp(min=0)]) * (visible > 0)[:, None]


def build_model(
    config: Config,
    tables: dict[str, int],
    base_rate: float,
    table_device: torch.device | None = None,
    vector_width: int = 0,
) -> HLLM:
    """Assemble the model of a configuration, on the CPU (or the default device).

    Args:
        tables: {categorical feature: rows}, see `BatchRecipe.tables`.
        base_rate: share of positive training labels.
        table_device: "meta" when TorchRec will shard the tables.
        vector_width: V of the dense item features, 0 without.
    """
    item_llm, item_width = _build_item_llm(config)
    user = UserLLM(
        build_backbone(config.user.pretrained, config.user.shape, config.user.layers, word_embeddings=False),
        config.user.dropout,
    )
    user.requires_grad_(config.user.trainable)
    features = HybridFeatures(
        {name: rows for name, rows in tables.items() if name != ACTION_GATE},
        user.width,
        time_depth=config.features.time_depth,
        time_width=config.features.time_width,
        numeric=len(config.data.numeric_features),
        of_items=("item_id", *config.data.item_features),
        gate_rows=tables.get(ACTION_GATE, 0),
        scale=config.features.init_scale,
        device=table_device,
    )
    return HLLM(item_llm, item_width, features, user, config, base_rate, vector_width)


def _build_item_llm(config: Config) -> tuple[ItemLLM | None, int]:
    item = config.item_llm
    if not item.enabled:
        return None, 0
    model = ItemLLM(build_backbone(item.pretrained, item.shape, item.layers), item.pooling, item.causal)
    model.requires_grad_(item.trainable)
    if item.freeze_words:
        model.backbone.get_input_embeddings().requires_grad_(False)
    return model, model.width
