"""Section `objective` of the configuration: heads, tasks and losses, and its rules."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hllm_torchrec.config.bounds import out_of_bounds
from hllm_torchrec.config.checking import dataclass_problems
from hllm_torchrec.modules.fusion import Fusion

if TYPE_CHECKING:
    from hllm_torchrec.config.schema import Config


@dataclass(frozen=True)
class TaskConfig:
    """Loss of one label (docs/tasks.md)."""

    loss: Literal["auto", "bce", "ordinal", "huber", "weighted_logistic"] = "auto"
    """auto: bce for a binary label, ordinal (a softmax over its values) for an ordinal label, huber for a regression.
    weighted_logistic: the predicted odds are the expected value of a label of at least 0, such as watch time."""
    weight: float = 1.0
    """Weight of the label's mean loss in L_cls; 0 leaves it out."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """L = lambda * L_gen + L_cls (Eq. 3); with several tasks L_cls is the weighted sum of their losses."""

    fusion: Literal["late", "early", "none"] = "late"
    """Position of the target: in the prediction head (late) or as an input of the user encoder (early); `none`:
    generative loss only (Eq. 1)."""
    generative_weight: float = 0.0
    """lambda of Eq. (3); with fusion `none` the generative loss has weight 1."""
    classification_weight: float = 1.0
    """Weight of L_cls; 0 leaves it out (the head is then not trained)."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Labels to predict, by name, each with its `TaskConfig`: {click: {}, like: {weight: 0.5}}. The first label of the
    dataset must be among them. Empty: only the first label."""
    task_weighting: Literal["fixed", "uncertainty"] = "fixed"
    """uncertainty: exp(-s) L + s with a learned s replaces the loss L of each task, and is multiplied by the task's
    weight (Kendall et al. 2018)."""
    position_bias: tuple[str, ...] = ()
    """Categorical context features, such as [position], whose effect on binary labels is learned as a separate term of
    the logit. In evaluation and serving, a constant replaces this term."""
    towers: Literal["shared_bottom", "mmoe"] = "shared_bottom"
    """Layers that tasks share in the head: one hidden layer (shared_bottom), or `experts` hidden layers that are mixed
    by a gate per task (mmoe)."""
    experts: int = 4
    """Number of experts of `towers: mmoe`."""
    value_weight: float = 0.0
    """Weight of an auxiliary squared error on the number of the exposure's action (rating), scaled to [-1, 1]; on its
    label, if actions do not have different numbers."""
    item_space: Literal["auto", "text", "features"] = "auto"
    """Vector space in which the generative loss compares items. text: only the embedding E of the Item LLM, as in the
    paper; features: P(E) + ID + item features, also available to an ID-only model. auto: text if there is an Item LLM,
    else features."""
    text_similarity: float = 0.0
    """Above 0: retrieval adds the cosine between an item's text embedding, in its full width, and the decayed mean of
    the text embeddings of the history. The value is the weight of this cosine relative to the learned cosine. It does
    not change training: see `hllm_torchrec.modules.features.text_similarity`. Needs the item space features; works best
    with item_llm.whiten."""
    text_decay: float = 0.7
    """Weight of an event relative to the event after it, in the decayed mean of `text_similarity` and in the history of
    `transitions`."""
    transitions: float = 0.0
    """Above 0: retrieval adds a score of an item from a regression of the next item on the history (and on its texts,
    if the Item LLM is frozen), which is solved when training starts. The value is the weight of this score relative to
    the learned cosine; the mean score of the items that came next in training is 1. It does not change training: see
    `hllm_torchrec.data.transitions`. Needs the item space features."""
    generative_loss: Literal["infonce", "bce"] = "infonce"
    """infonce: Eq. (1), a sampled softmax; bce: binary cross-entropy of the positive plus the mean over the negatives
    (SASRec)."""
    negatives: int = 512
    """Number of items sampled from the catalogue per micro-batch; all users and ranks share them."""
    mask_own_items: bool = True
    """Exclude the items of a user's sequence from that user's negatives. False: only the positive of a position is
    masked (plain softmax), so items that occur later in the sequence are negatives."""
    mask_cosine_above: float | None = None
    """Also mask negatives whose embedding has a cosine above this value with that of the positive (infonce only). The
    published HLLM code uses only this mask, with 0.99 (`mask_own_items: false`); if embeddings collapse, it masks all
    negatives."""
    temperature: float = 0.05
    """Initial value of the learnable temperature of the similarity, at least 0.01."""
    positive_targets_only: bool = True
    """Only items with label 1 or an unknown label are targets of the generative loss."""
    head_hidden: int = 128
    """Width of the prediction head's hidden layer."""
    head_dropout: float = 0.0
    """Dropout probability in the prediction head."""
    collapse_above: float = 0.98
    """Stop if, after the warm-up, the mean cosine similarity between the item embeddings of the generative loss is
    above this value, which means that they have collapsed. In a run with creatives it is measured between user
    vectors, if creative.soft.normalize is none."""

    @property
    def task_configs(self) -> dict[str, TaskConfig]:
        """`tasks` as dataclasses; the rules have checked their contents."""
        return {name: TaskConfig(**content) for name, content in self.tasks.items()}

    @property
    def generates(self) -> bool:
        """True if there is a generative loss."""
        return not self.has_head or self.generative_weight > 0

    @property
    def has_head(self) -> bool:
        """True if exposures are classified."""
        return Fusion(self.fusion).has_queries


def objective_problems(config: "Config") -> Iterator[str]:
    """Yield violated rules of the generative loss and its items."""
    text, objective = config.item_llm.enabled, config.objective
    generates = objective.generates
    if objective.text_similarity:
        if not text or objective.item_space != "features" or not generates:
            yield (
                f"objective.text_similarity: {objective.text_similarity}: needs an Item LLM, objective.item_space "
                "features and the generative loss; set them, or leave it out"
            )
        if config.user.actions == "interleaved":
            yield "objective.text_similarity: action tokens have no text; write user.actions: summed, or leave it out"
    if objective.transitions:
        if objective.item_space != "features" and (text or objective.item_space == "text") or not generates:
            yield (
                f"objective.transitions: {objective.transitions}: needs objective.item_space features and the "
                "generative loss; set them, or leave it out"
            )
        if config.user.actions == "interleaved":
            yield "objective.transitions: action tokens are not items; write user.actions: summed, or leave it out"
    if objective.mask_cosine_above is not None and objective.generative_loss != "infonce":
        yield (
            f"objective.mask_cosine_above: {objective.mask_cosine_above}: only for generative_loss infonce; leave it "
            "out"
        )
    if not text and not config.features.item_id:
        yield "features.item_id: false while item_llm.enabled is false: items would have no features"
    if not text and generates and objective.item_space == "text":
        yield (
            "objective.item_space: 'text' while item_llm.enabled is false: there are no text embeddings to predict; "
            "write features (or auto)"
        )
    if config.evaluation.retrieval and not generates:
        yield (
            "evaluation.retrieval: true without a generative loss: set objective.generative_weight above 0, "
            "or retrieval to false"
        )
    ks = config.evaluation.ks
    if (config.evaluation.retrieval or not objective.has_head) and min(ks, default=0) < 1:
        yield f"evaluation.ks: {list(ks)}: give at least one K, each at least 1"


def task_entry_problems(tasks: Mapping[str, Any], setting: str) -> Iterator[str]:
    """Yield problems of the entries of `tasks`; `models.tasks` checks their labels against the dataset.

    setting: dotted field of `tasks`, for messages.
    """
    for name, content in tasks.items():
        field = f"{setting}.{name}"
        problems = list(dataclass_problems(content, TaskConfig, field))
        yield from problems or out_of_bounds(TaskConfig(**content), {"weight": ">= 0"}, f"{field}.")


def task_problems(config: "Config") -> Iterator[str]:
    """Yield violated rules of tasks, their weights and the position bias."""
    objective = config.objective
    yield from task_entry_problems(objective.tasks, "objective.tasks")
    if objective.tasks and not objective.has_head:
        yield "objective.tasks: objective.fusion 'none' has no head that predicts them; leave them out"
    if objective.tasks and objective.value_weight:
        yield (
            f"objective.value_weight: {objective.value_weight}: with objective.tasks the value is a task; declare it "
            "as an ordinal label, or leave tasks out"
        )
    if objective.has_head and not objective.classification_weight and not objective.generates:
        yield (
            "objective.classification_weight: 0 without a generative loss: nothing would be trained; set "
            "objective.generative_weight above 0"
        )
    both = sorted(set(objective.position_bias) & set(config.data.context))
    if both:
        yield f"objective.position_bias: {both[0]!r} is in data.context too, where serving would need it; leave one out"
    if objective.position_bias and not objective.has_head:
        yield "objective.position_bias: objective.fusion 'none' has no logit that is biased; leave it out"
    if objective.task_weighting == "uncertainty" and len(objective.tasks) < 2:
        yield "objective.task_weighting: 'uncertainty' weighs several tasks; name them in objective.tasks"


def drawn_problems(config: "Config") -> Iterator[str]:
    """Yield problems of `data.drawn_negatives`: missing stores, and settings that do not fit drawn negatives."""
    drawn, objective = config.data.drawn_negatives, config.objective
    stores = (drawn.item_store, drawn.user_store)
    if (drawn.by == "hard") != all(stores) or any(stores) != all(stores):
        yield (
            f"data.drawn_negatives.by: {drawn.by!r}: hard negatives need both item_store and user_store, all other "
            "kinds neither"
        )
    if not drawn.count:
        return
    if not objective.has_head:
        yield "data.drawn_negatives.count: objective.fusion 'none' has no head that they train; write 0"
    if objective.tasks or objective.position_bias:
        yield (
            "data.drawn_negatives.count: drawn items have no other labels and no position: leave out objective.tasks "
            "and objective.position_bias"
        )
