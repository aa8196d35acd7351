"""Configuration: frozen, typed dataclasses; one YAML per experiment; dotted overrides on the command line.

`loading` parses files and options, `rules` has the ranges of numbers and the rules that span fields.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.rules import config_problems
from hllm_torchrec.modules.fusion import Fusion


@dataclass(frozen=True)
class ReliabilityConfig:
    """What a run does when something goes wrong."""

    not_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradients are NaN or infinite: stop, or skip it, that is leave the weights as they are. Its
    batch's ids are written to `bad_batches` in either case."""
    max_skipped: int = 10
    """So many steps may be skipped in a row; the next one stops the run."""
    leakage: Literal["warn", "stop"] = "warn"
    """At a validation AUC above `leakage_above`, where mostly a feature tells the label: warn, or stop after that
    evaluation's checkpoint."""
    leakage_above: float = 0.99
    """AUC that is taken for leakage; `hllm evaluate` warns above the same."""
    asynchronous_checkpoints: bool = False
    """Training waits only until its state is copied to the host's memory (which must have room for a rank's share of
    it); a thread writes it meanwhile."""
    disk_full: Literal["stop", "go_on"] = "stop"
    """A checkpoint that finds no room: stop, or go on without it and try again when the next is due. The last
    one of a run is never done without."""
    no_checkpoint_left: Literal["stop", "begin"] = "stop"
    """A run that resumes and finds damaged checkpoints only: stop and say so, or begin anew beside them."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on an LLM whose own weights stay as they are: W x + alpha / rank * B A x."""

    rank: int = 0
    """Of the adapters; 0: none, the LLM itself trains."""
    alpha: float = 16.0
    """Adapters add alpha / rank times their product. They begin as nothing."""
    dropout: float = 0.0
    """Of an adapter's input, a probability."""
    targets: tuple[str, ...] = ()
    """Last names of the linear layers that get one, such as [q_proj, v_proj]; none given: all of the LLM's layers."""


@dataclass(frozen=True)
class LogsConfig:
    """Who is told of a run besides its directory."""

    wandb: str | None = None
    """Project of Weights & Biases that the run's numbers go to as well (package wandb). Its own variables say how:
    WANDB_MODE=offline writes them into the run's directory, for `wandb sync` later."""


@dataclass(frozen=True)
class DataConfig:
    """Which dataset, and what of it a sample holds."""

    dataset: str = "data/ml-100k"
    """Directory written by `hllm prepare`."""
    history: Literal["all", "positive"] = "all"
    """Earlier events that form the history: all with their action, or those with label 1, as in the paper."""
    max_history: int = 1024
    """A pass over a user holds at most this many events; longer users are cut into overlapping pieces, in
    which an exposure sees between max_history / 2 and max_history events (all, where there are fewer)."""
    batch_users: int = 8
    """User pieces per rank and step."""
    stochastic_length: float = 0.0
    """alpha of Stochastic Length (HSTU; 1.6 to 1.9 there): in training, a history longer than max_history^(alpha / 2)
    is mostly read as a subsample of that length. 0: off. Every exposure and generative target stays."""
    stochastic_choice: Literal["recent", "uniform"] = "recent"
    """Events of such a subsample: drawn with weights that fall with age, or all alike."""
    batch_item_tokens: int = 0
    """Above 0: a rank's training step has users whose events have at most this many text tokens together, instead of
    batch_users of them; steps then cost alike. A stage's own batch_users goes before it."""
    item_features: tuple[str, ...] = ()
    """Categorical item features of the dataset added to history, query and target, e.g. [genres]."""
    user_features: tuple[str, ...] = ()
    """Categorical user features added to queries, e.g. [gender]."""
    numeric_features: tuple[str, ...] = ()
    """Numbers computed from strictly earlier events, added to queries: names of
    `hllm_torchrec.data.numeric_features`, or module:name of a function of your own."""
    item_vectors: tuple[str, ...] = ()
    """Dense item features through a linear layer: `factors` (see `hllm_torchrec.data.item_factors`, fitted to the
    training part when first asked for) or the name of a float32 array [N, V] in <dataset>/vectors/<name>.npy."""
    id_dropout: float = 0.0
    """Probability, in training, that an item's ID is read as unknown (0), a row that cold items then use."""
    cold_dropout: float = 0.0
    """Above 0: items without a training event are read as unknown, ID 0 and item_vectors of zeros, and so is, in
    training, each item of a step with this probability: the model learns to do with text and item features."""
    train_part: Literal["train", "train_and_valid"] = "train"
    """Which events train: those of the training part, or those of the validation part too. The second is for the
    last run, when nothing is left to choose: validation metrics are then of events that were trained on."""
    train_users: float = 1.0
    """Share of the users that are trained on, chosen by a hash of the user, so that a smaller share is part of a larger
    one: for learning curves. Item counts, `factors` and numeric features stay those of the whole dataset."""
    prefetch: int = 2
    """Batches prepared ahead by the background thread."""


@dataclass(frozen=True)
class ItemLLMConfig:
    """The Item LLM: text to item embedding."""

    enabled: bool = True
    """False: no text at all; items are their IDs (an ID-only sequence model)."""
    pretrained: str | None = None
    """Hugging Face directory with weights and tokeniser."""
    tokenizer: str | None = None
    """Tokeniser directory, where it is not beside the weights."""
    shape: dict[str, Any] | None = None
    """Hugging Face config of a model with random weights, instead of `pretrained`."""
    layers: int | None = None
    """Keep the first n layers (none given: all)."""
    pooling: Literal["item", "mean"] = "item"
    """Read the learned [ITEM] vector's output, or average the text's (the paper's Table 10)."""
    causal: bool = True
    """True for decoders, False for encoders such as BERT."""
    trainable: bool = True
    """False freezes the Item LLM in every stage (the paper's Table 4)."""
    store: str | None = None
    """Embedding store (see `hllm embed`) for stages with `item_embeddings: stored`; made by this same Item LLM."""
    adapter: int = 0
    """Above 0: width of a trained residual bottleneck on top of stored embeddings; it begins as the identity."""
    standardise: bool = False
    """Centre and scale E, dimension by dimension, before it is projected to the user encoder's width, by mean and
    spread of 1,024 items measured before the first step. Embeddings in stores and a loss in `text` space stay raw."""
    freeze_words: bool = False
    """Keep the word embeddings as they are: they are most of a small LLM's weights and optimizer state."""
    prompt: str = ""
    """Put before every item's text."""
    text_keys: tuple[str, ...] = ("title",)
    """Text columns, flattened to `key: value` in this order."""
    separator: str = ", "
    """Between the key-value pairs."""
    max_text_length: int = 256
    """Tokens of an item's text, prompt included."""
    trained_share: float = 1.0
    """Share of a step's items through which gradients flow; the others' embeddings come from a cache."""
    refresh_after: int = 20
    """Steps after which a cached embedding is made anew; matters where trained_share is below 1."""
    items_at_once: int = 0
    """Above 0: a rank keeps the activations of at most this many items of a step; the backward pass makes them again,
    group after group, for a third more compute. With thousands of negatives nothing else fits."""
    share_prefix: bool = True
    """Encode the tokens with which most texts begin (the prompt) once per step and let all items attend to them;
    the same values and gradients for less work. Encoders (`causal: false`) do without."""
    attention: Literal["auto", "buckets", "varlen", "flash", "flex"] = "auto"
    """Kernel for packed texts: padded length-sorted buckets with SDPA (any device), torch's varlen or the
    flash-attn package (CUDA with `parallel.precision: bf16`); auto takes the first of these that can run. flex:
    torch's FlexAttention (CUDA), only where it is named."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters that train instead of the Item LLM's own weights; the [ITEM] vector trains besides."""

    @property
    def has_backbone(self) -> bool:
        """Whether it is a Hugging Face model."""
        return self.enabled


@dataclass(frozen=True)
class UserEncoderConfig:
    """The User LLM, or what stands in its place."""

    encoder: str = "llm"
    """llm: a Hugging Face decoder; hstu, sasrec and ligr are described by `shape`, see `modules.encoders.shapes`;
    module:Name: a `UserEncoder` of your own (docs/tutorials/add_a_user_encoder.md)."""
    pretrained: str | None = None
    """Hugging Face directory of a decoder; its word embeddings are dropped."""
    shape: dict[str, Any] | None = None
    """Hugging Face config of a decoder with random weights, instead of `pretrained`; for the other encoders the
    fields of HSTUShape, SASRecShape or LiGRShape, or of your own encoder's `Shape`."""
    layers: int | None = None
    """Keep the first n layers of the decoder (none given: all)."""
    trainable: bool = True
    """False freezes it (the paper's Table 4)."""
    dropout: float = 0.0
    """Of the inputs, a probability."""
    actions: Literal["summed", "interleaved"] = "summed"
    """How the history tells what was done with an item (features.action). summed: the action is added to the event;
    interleaved: an event is two tokens, its item and then its action (HSTU's sequence), for twice the length. Windows,
    prefixes and tables of positions then count tokens."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters that train instead of the User LLM's own weights (encoder llm only)."""

    @property
    def has_backbone(self) -> bool:
        """Whether it is a Hugging Face model."""
        return self.encoder == "llm"


@dataclass(frozen=True)
class FeatureConfig:
    """ID and time features, sum-pooled with the item embedding."""

    item_id: bool = True
    """Add the item's ID embedding."""
    action: bool = True
    """Add the action's embedding (rating, click, skip) to the history."""
    action_gate: bool = False
    """Scale an event's item features by 1 + gate(action), so that a bad rating can turn them round."""
    time_depth: int = 6
    """Components of year, month, day, hour, minute, second that are used; 0: no time."""
    time_width: int = 32
    """Width of each component's table."""
    init_scale: float = 0.02
    """Table entries start uniform in +-init_scale."""
    shard_from_rows: int = 1024
    """Tables with fewer rows are replicated (data parallel) and belong to the dense optimizer."""
    sharding: Literal["table_wise", "column_wise", "row_wise", "auto"] = "table_wise"
    """How the larger tables are sharded; `auto` leaves it to TorchRec's planner."""
    table_dtype: Literal["fp32", "fp16"] = "fp32"
    """Of the larger tables' weights; their optimizer state is float32 all the same (bytes: docs/retrieval.md)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """L = lambda * L_gen + L_cls (Eq. 3)."""

    fusion: Literal["late", "early", "none"] = "late"
    """Where the target meets the user: in the head, or in the User LLM; `none`: generative only (Eq. 1)."""
    generative_weight: float = 0.0
    """lambda of Eq. (3); with fusion `none` the generative loss has weight 1."""
    value_weight: float = 0.0
    """Weight of an auxiliary squared error on the exposure's ordinal action (rating) scaled to [-1, 1]."""
    item_space: Literal["auto", "text", "features"] = "auto"
    """Where positives and negatives of the generative loss live. text: E of the Item LLM alone, as in the paper;
    features: P(E) + ID + item features, which an ID-only model has. auto: text where there is an Item LLM."""
    generative_loss: Literal["infonce", "bce"] = "infonce"
    """infonce: Eq. (1), a sampled softmax; bce: one binary decision for the positive and one, the mean over the
    negatives, against them (SASRec)."""
    negatives: int = 512
    """Items drawn per step from the catalogue, shared by all users and ranks of the step."""
    mask_own_items: bool = True
    """Items of a user's sequence are no negatives of its positions. False: only a position's positive is masked, as
    in a plain softmax, so that what comes later, but not next, is a negative."""
    temperature: float = 0.05
    """Where the learnable temperature of the similarity starts (it stays >= 0.01)."""
    positive_targets_only: bool = True
    """The next item to generate is predicted only where its label is 1 (or unknown)."""
    head_hidden: int = 128
    """Width of the prediction head's hidden layer."""
    head_dropout: float = 0.0
    """In the prediction head, a probability."""
    collapse_above: float = 0.98
    """Stop when, after the warm-up, the mean cosine similarity between item embeddings is above this: all items
    look the same."""

    @property
    def generates(self) -> bool:
        """Whether there is a generative loss."""
        return not self.has_head or self.generative_weight > 0

    @property
    def has_head(self) -> bool:
        """Whether exposures are classified."""
        return Fusion(self.fusion).has_queries


@dataclass(frozen=True)
class StageConfig:
    """A stretch of training (the paper's three stages are three of them)."""

    name: str
    """Shown in the log."""
    epochs: float = 1.0
    """Passes over the training users; fractions are allowed."""
    item_embeddings: Literal["trained", "cached", "stored"] = "trained"
    """They come from the Item LLM, with gradients; from a cache filled when the stage begins; or (the paper's stage
    II, then in all stages of a run) from `item_llm.store` as a frozen table, sharded over the ranks."""
    max_history: int | None = None
    """Overrides data.max_history (150 in the paper's stage I, 1000 in stage II)."""
    batch_users: int | None = None
    """Overrides data.batch_users."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizers: AdamW for dense parts, an in-backward one for sharded tables."""

    lr: float = 1e-3
    """Learning rate of dense parts that no other field names."""
    item_llm_lr: float = 1e-4
    """Of the Item LLM (the paper's setting)."""
    user_lr: float | None = None
    """Of the user encoder; none given: `lr`."""
    table_lr: float = 0.05
    """Of sharded tables."""
    table_optimizer: str = "rowwise_adagrad"
    """In-backward optimizer of sharded tables: rowwise_adagrad, adagrad or sgd; adam and partial_rowwise_adam run on
    CUDA only. Tables step at every micro-batch, unclipped, whatever `accumulate` and `clip_norm` say: they are updated
    inside the backward pass."""
    table_options: dict[str, float] = field(default_factory=dict)
    """Its hyperparameters besides the learning rate, such as {eps: 1.0e-6} (adagrad) or {beta1: 0.9, beta2: 0.98}
    (adam); FBGEMM's defaults otherwise. `hllm_torchrec.config.table_optimizers` lists them."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's means of gradients and of squared gradients, of the dense parts."""
    weight_decay: float = 0.01
    """Decoupled, on matrices only."""
    warmup: float = 0.05
    """Share of all steps over which the learning rate rises."""
    min_lr_ratio: float = 0.05
    """The cosine ends at this share of the learning rate."""
    clip_norm: float = 1.0
    """Gradient norm of the dense parts; 0: no clipping."""
    accumulate: int = 1
    """Micro-batches per dense step."""
    ema: float = 0.0
    """Decay of an exponential average of the dense weights used in evaluation; 0: none."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model meets the machine."""

    dense: Literal["ddp", "fsdp"] = "ddp"
    """Dense parts are replicated (DDP) or sharded (FSDP2)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of the forward pass; weights stay fp32."""
    activation_checkpointing: bool = False
    """Recompute the LLMs' layers in the backward pass."""
    compile: bool = False
    """torch.compile the LLMs' layers."""
    overlap_tables: bool = False
    """Exchange the table ids of the next batch while the present one is computed; changes no number."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before it gives up."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training, and the checkpoint that is kept."""

    every: float = 1.0
    """Epochs between evaluations on the validation part, each with a checkpoint; fractions are allowed."""
    checkpoint_every: int = 0
    """Steps between further checkpoints, without an evaluation; 0: none."""
    patience: int = 0
    """Stop after this many evaluations without a better AUC (without fusion: NDCG at the first of `ks`); 0:
    never."""
    batch_users: int = 16
    """User pieces per rank and step."""
    auc: Literal["exact", "approximate"] = "exact"
    """During training: exact, or by a histogram with a bound on its error. `hllm evaluate` is always exact."""
    retrieval: bool = False
    """Also Recall@K and NDCG@K over the whole catalogue (needs the generative loss). Targets are what the
    generative loss has for targets: positive exposures, or all (objective.positive_targets_only)."""
    filter_seen: bool = True
    """Items of a user's history are no candidates."""
    protocol: Literal["leave_one_out", "ml1m_hstu"] | None = None
    """Published protocol that the run follows; what it asks of other fields is checked, and its name goes into
    the results (`hllm_torchrec.config.eval_protocols`)."""
    ks: tuple[int, ...] = (10, 50, 200)
    """K of Recall@K and NDCG@K; the first is for the choice of the best checkpoint."""
    keep_last: int = 2
    """Checkpoints kept, besides the best."""


@dataclass(frozen=True)
class Config:
    """One experiment."""

    output: str = "runs/default"
    """Run directory: log, checkpoints, predictions, metrics."""
    seed: int = 0
    """Of weights, shuffling, negatives and dropout."""
    resume: bool = False
    """Continue from the last complete checkpoint of `output`, or begin where there is none: what a job that is
    restarted after a failure wants."""
    start_from: str | None = None
    """Begin with the weights of another run's best checkpoint (its directory), or of the checkpoint named: the Item
    LLM and the user encoder must be the same; other parts that it has not got keep their initial values."""
    max_steps: int = 0
    """Stop after this many steps; 0: run all stages."""
    data: DataConfig = field(default_factory=DataConfig)
    """Dataset and batches."""
    item_llm: ItemLLMConfig = field(default_factory=ItemLLMConfig)
    """Item LLM."""
    user: UserEncoderConfig = field(default_factory=UserEncoderConfig)
    """User encoder."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """Hybrid features."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Losses."""
    stages: tuple[StageConfig, ...] = (StageConfig(name="end to end"),)
    """Run one after the other."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizers."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Distribution and precision."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation."""
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
    """Faults."""
    logs: LogsConfig = field(default_factory=LogsConfig)
    """Who is told of the run, besides its directory."""

    def __post_init__(self) -> None:
        problems = config_problems(self)
        if problems:
            raise ConfigError(problems)
