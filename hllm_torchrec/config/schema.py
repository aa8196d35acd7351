"""Configuration: frozen, typed dataclasses; one YAML per experiment; dotted overrides on the command line.

`loading` parses files and options; `rules` contains the ranges of numbers and the rules across fields.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.objective import ObjectiveConfig
from hllm_torchrec.config.rules import config_problems


@dataclass(frozen=True)
class ReliabilityConfig:
    """Behavior on faults."""

    not_finite: Literal["stop", "skip"] = "stop"
    """If the loss or the gradients of a step are NaN or infinite: stop, or skip the step. Skipping leaves the dense
    weights unchanged; rows of sharded tables may have been updated before. The ids of the step's batch are written to
    `bad_batches` in both cases."""
    max_skipped: int = 10
    """Maximum number of consecutive skipped steps; one more stops the run."""
    leakage: Literal["warn", "stop"] = "warn"
    """At a validation AUC above `leakage_above`, which usually means that a feature contains the label: warn, or stop
    after the checkpoint of that evaluation."""
    leakage_above: float = 0.99
    """AUC above which leakage is assumed. `hllm evaluate` always warns above 0.99."""
    asynchronous_checkpoints: bool = False
    """True: training waits only until its state is copied to host memory, which needs space for a rank's share of the
    state; a thread then writes the checkpoint while training continues."""
    disk_full: Literal["stop", "go_on"] = "stop"
    """If the disk is full: stop, or continue without this checkpoint and write the next one when it is due. The last
    checkpoint of a run is always required."""
    no_checkpoint_left: Literal["stop", "begin"] = "stop"
    """If a resumed run finds only damaged checkpoints: stop with an error, or start from scratch and leave the damaged
    checkpoints in the directory."""


@dataclass(frozen=True)
class LogsConfig:
    """Metric sinks in addition to the run directory."""

    wandb: str | None = None
    """Weights & Biases project to which the run's metrics are also logged (package wandb). The environment variables of
    wandb apply: WANDB_MODE=offline writes the metrics into the run directory, for `wandb sync` later."""


@dataclass(frozen=True)
class DrawnNegativesConfig:
    """Negatives drawn from the catalogue for the ranking head (docs/tasks.md)."""

    count: int = 0
    """Number of draws per positive exposure in training; 0: none."""
    by: Literal["uniform", "popularity", "batch", "hard"] = "uniform"
    """Distribution of the draws. uniform: all items; popularity: by training events; batch: items of the other
    exposures of the rank's batch; hard: half uniform, half from the items that a retrieval run finds for the user."""
    item_store: str | None = None
    """Only for `by: hard`: store that `hllm embed --items` has written from the retrieval run."""
    user_store: str | None = None
    """Only for `by: hard`: store that `hllm embed --users` has written from the same run."""
    top: int = 100
    """Only for `by: hard`: number of candidates per user."""


@dataclass(frozen=True)
class DataConfig:
    """Dataset and contents of a sample."""

    dataset: str = "data/ml-100k"
    """Directory written by `hllm prepare`."""
    version: int | None = None
    """Version of the dataset; null: the newest one when the run starts. A resumed run continues with that version;
    other jobs on the run read the newest version when they start."""
    history: Literal["all", "positive"] = "all"
    """Earlier events that form the history: all events with their actions, or only those with label 1, as in the
    paper."""
    max_history: int = 1024
    """Maximum number of events per pass. Longer user sequences are cut into overlapping pieces, in which an exposure
    sees between max_history / 2 and max_history - 1 earlier events, or all of them if there are fewer."""
    batch_users: int = 8
    """Number of user pieces (see max_history) per rank and micro-batch (see optim.accumulate)."""
    stochastic_length: float = 0.0
    """alpha of Stochastic Length (1.6 to 1.9 in the HSTU paper): in training, a history longer than
    max_history^(alpha / 2) is usually replaced by a subsample of that length. 0: off. All exposures and generative
    targets are retained."""
    stochastic_choice: Literal["recent", "uniform"] = "recent"
    """Sampling of the events for Stochastic Length: with weights that decrease with age, or uniformly."""
    batch_item_tokens: int = 0
    """Above 0: maximum sum of (text tokens + 1) over the events of a rank in a training micro-batch, on average over
    the ranks, instead of batch_users; steps then have similar cost. A stage's batch_users takes precedence."""
    item_features: tuple[str, ...] = ()
    """Categorical item features of the dataset added to history, query and target, e.g. [genres]."""
    user_features: tuple[str, ...] = ()
    """Categorical user features added to queries, e.g. [gender]."""
    numeric_features: tuple[str, ...] = ()
    """Numbers computed from strictly earlier events, added to queries: names of
    `hllm_torchrec.data.numeric_features`, or module:name of a custom function."""
    context: tuple[str, ...] = ()
    """Context features of the request, as declared by the dataset (docs/tasks.md), added to queries, e.g. [device,
    price]."""
    item_vectors: tuple[str, ...] = ()
    """Dense item features, projected by a linear layer: `factors` (see `hllm_torchrec.data.item_factors`; fitted to the
    training part when the run starts, and saved with the run), or the name of a float32 array [N, V] in
    <dataset>/vectors/<name>.npy."""
    evidence: tuple[str, ...] = ()
    """Evidence: results of simple predictors for each exposure, computed from strictly earlier events. A linear
    function of them is added to the logit, and they are inputs of the head. Groups (`hllm_torchrec.data.evidence`):
    factors, items, users, neighbors, tastes, crosses. neighbors needs a frozen Item LLM; tastes needs a frozen one if
    there is an Item LLM."""
    id_dropout: float = 0.0
    """Probability, in training, that the ID of a history item or of a target is replaced by the unknown ID 0. So the
    row of ID 0 is trained, which represents items that the tables do not have."""
    cold_dropout: float = 0.0
    """Above 0: items without a training event are treated as unknown (ID 0 and zero item_vectors). In training each
    item of a batch is treated the same way with this probability, so the model learns to rely on text and item
    features."""
    negative_rate: float = 1.0
    """In training, share of the negative exposures (first label 0) that are used, with a new draw in every epoch. The
    training logit is corrected for this share, so that served probabilities are right for the complete traffic. The
    other negative exposures are still part of the history."""
    drawn_negatives: DrawnNegativesConfig = field(default_factory=DrawnNegativesConfig)
    """Negatives for the ranking head on data in which every event is positive."""
    train_part: Literal["train", "train_and_valid"] = "train"
    """Events used for training: those of the training part, or of the training and validation parts. Use
    train_and_valid only for the final run, after all choices: validation metrics are then computed on training
    events."""
    train_since: int | str | None = None
    """Train on exposures and targets from this time on (a date, a date-time in UTC, or seconds since 1970); older
    events are only history. null: train on all. For nightly training on new events."""
    train_late_after: int | None = None
    """Only with `train_since`: number of a dataset version, normally that of `start_from`. Events before `train_since`
    that were added in later versions are then trained on as well. null: such late events are only history."""
    feedback_delay: int = 0
    """Delay in seconds after which an event is visible: a request sees only events that are older than this, in
    training, evaluation, embedding jobs and the scorer. Set it to the delay of the event feed in production."""
    train_users: float = 1.0
    """Share of the users that is used for training, for learning curves. Users are selected by a hash, so the users of
    a smaller share are a subset of those of a larger share. Item counts, `factors` and numeric features still use the
    complete dataset."""
    prefetch: int = 2
    """Number of batches that the background thread prepares in advance."""


@dataclass(frozen=True)
class OpenTableConfig:
    """Table of an open vocabulary: any number of ids in a fixed number of rows (docs/retrieval.md)."""

    kind: Literal["hash"]
    """hash: TorchRec's managed collisions (ZCH). In training an id is assigned a row of its own, which another id can
    take after `evict_after` steps without use. Ids that find no free row share reserved rows."""
    rows: int
    """Minimum number of rows, rounded up to a multiple of 15,360; choose about 1.5 times the number of ids in use."""
    evict_after: int = 10_000
    """Number of training steps (micro-batches) without a lookup of an id after which its row may pass to a new id."""


@dataclass(frozen=True)
class FeatureConfig:
    """ID and time features, sum-pooled with the item embedding."""

    item_id: bool = True
    """Add the item's ID embedding."""
    action: bool = True
    """Add the action's embedding (rating, click, skip) to the history."""
    action_gate: bool = False
    """Scale an event's item features by 1 + gate(action), so that a bad rating can invert them."""
    time_depth: int = 6
    """Number of components that are used of year, month, day, hour, minute and second, in this order; 0: no time
    features."""
    time_width: int = 32
    """Width of each component's table."""
    init_scale: float = 0.02
    """Table entries are initialized uniformly in +-init_scale."""
    new_rows: Literal["noise", "unknown", "neighbors"] = "noise"
    """Initial rows of ids that the loaded checkpoint does not have. noise: the random initialization; unknown: a copy
    of the row of the unknown id 0; neighbors: for items the mean ID embedding of the known items that are most similar
    in text (without an Item LLM: in item features), for other ids as `unknown`."""
    shard_from_rows: int = 1024
    """Tables with fewer rows are replicated (data parallel) and belong to the dense optimizer."""
    sharding: Literal["table_wise", "column_wise", "row_wise", "auto"] = "table_wise"
    """Sharding of the larger tables; `auto` lets TorchRec's planner choose."""
    table_dtype: Literal["fp32", "fp16"] = "fp32"
    """Data type of the larger tables' weights; their optimizer state is always float32 (bytes: docs/retrieval.md)."""
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tables of open vocabularies, by feature: {item_id: {kind: hash, rows: 1000000, evict_after: 10000}}. Possible
    features: item_id, action, and those of data.item_features and data.user_features. The tables are float32 and
    sharded by rows."""


@dataclass(frozen=True)
class StageConfig:
    """A stage of training (the paper has three)."""

    name: str
    """Shown in the log."""
    epochs: float = 1.0
    """Passes over the training users; fractions are allowed."""
    item_embeddings: Literal["trained", "cached", "stored"] = "trained"
    """Source of item embeddings. trained: the Item LLM, with gradients; cached: a cache that is filled at the start of
    the stage; stored (the paper's stage II): `item_llm.store` as a frozen table, sharded over the ranks. If one stage
    has `stored`, all stages of the run must."""
    max_history: int | None = None
    """Overrides data.max_history (150 in the paper's stage I, 1000 in stage II)."""
    batch_users: int | None = None
    """Overrides data.batch_users."""
    trains: Literal["all", "creative"] = "all"
    """Parts that are trained. creative: only the Creative LLM and its head (soft prompt, losses); all other learning
    rates are 0. Until the Creative LLM has learned to write, its gradients would change the user encoder without
    improving it."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizers: AdamW for dense parts, an in-backward optimizer for sharded tables."""

    lr: float = 1e-3
    """Learning rate of the dense parts for which no other field sets one."""
    item_llm_lr: float = 1e-4
    """Learning rate of the Item LLM (the paper's setting)."""
    user_lr: float | None = None
    """Learning rate of the user encoder; null: `lr`."""
    creative_lr: float | None = None
    """Learning rate of the Creative LLM; null: `lr`. Its soft prompt always has `lr`."""
    table_lr: float = 0.05
    """Learning rate of sharded tables."""
    table_optimizer: str = "rowwise_adagrad"
    """In-backward optimizer of sharded tables: rowwise_adagrad, adagrad or sgd; adam and partial_rowwise_adam run on
    CUDA only. Tables are updated in every micro-batch without clipping, independent of `accumulate` and `clip_norm`,
    because the update is part of the backward pass."""
    table_options: dict[str, float] = field(default_factory=dict)
    """Hyperparameters of `table_optimizer` other than the learning rate, such as {eps: 1.0e-6} (adagrad) or
    {beta1: 0.9, beta2: 0.98} (adam); FBGEMM's defaults apply to the others. See
    `hllm_torchrec.config.table_optimizers`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the mean gradient and mean squared gradient, for the dense parts."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the matrices, except embedding tables."""
    warmup: float = 0.05
    """Share of all steps over which the learning rate increases linearly to its peak."""
    min_lr_ratio: float = 0.05
    """Final learning rate of the cosine schedule, as a share of the peak."""
    clip_norm: float = 1.0
    """Maximum gradient norm of the dense parts; 0: no clipping."""
    accumulate: int = 1
    """Number of micro-batches per step of the dense optimizer."""
    ema: float = 0.0
    """Decay of an exponential moving average of the dense weights except the Item LLM's, for evaluation; 0: none."""


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism and precision."""

    dense: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism of the dense parts: replicated (DDP) or sharded (FSDP2)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of the forward pass; weights stay fp32."""
    activation_checkpointing: bool = False
    """Recompute the layers of the LLMs and of the user encoder in the backward pass."""
    compile: bool = False
    """torch.compile the layers of the LLMs and of the user encoder."""
    overlap_tables: bool = False
    """Exchange the table ids of the next batch while the current one is computed; does not change results."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before it fails."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training, and the checkpoints that are retained."""

    every: float = 1.0
    """Epochs between evaluations on the validation part, each with a checkpoint; fractions are allowed."""
    checkpoint_every: int = 0
    """Steps between additional checkpoints without an evaluation; 0: none."""
    at_start: bool = False
    """Also evaluate before the first step, so that the untrained model can be the best one. With data.evidence, the
    untrained model is the logistic regression on the evidence."""
    select_by: Literal["auc", "gauc", "auc_and_gauc"] = "auc"
    """Metric by which checkpoints are compared, for the best one and for `patience`: AUC, GAUC (AUC within a user) or
    the mean of both. If no user has both labels, AUC is used instead of GAUC; if all validation labels are equal, the
    log loss; with fusion `none`, NDCG at the first of `ks`; with creatives, the likelihood of their texts."""
    patience: int = 0
    """Stop after this number of successive evaluations without improvement by `select_by`; 0: never."""
    batch_users: int = 16
    """Number of user pieces per rank and step."""
    history: Literal["request", "split"] = "request"
    """History of an exposure in a dataset that is split by time, for users with more than `data.max_history` events.
    request: the events that the scorer would read at that time (`window_start`), independent of the split; split: the
    events from `data.max_history` / 2 events before the user's first exposure of the split on. Runs of earlier versions
    keep `split`."""
    auc: Literal["exact", "approximate"] = "exact"
    """AUC during training: exact, or from a histogram with bounded error. `hllm evaluate` is always exact."""
    retrieval: bool = False
    """Also compute Recall@K and NDCG@K over the complete catalogue (needs the generative loss); with fusion `none` they
    are always computed. The targets are those of the generative loss: positive exposures, or all
    (objective.positive_targets_only)."""
    filter_seen: bool = True
    """Exclude the items of all earlier events of a user from the candidates, also those of events that the model does
    not read."""
    protocol: Literal["leave_one_out", "ml1m_hstu"] | None = None
    """Published protocol of the run; its requirements on other fields are checked, and its name is written into the
    results (`hllm_torchrec.config.eval_protocols`)."""
    drawn_negatives: int = 20
    """Only with data.drawn_negatives: number of uniform draws per exposure. The draws are the same for all runs, and
    each is weighted by the number of items that it represents."""
    ks: tuple[int, ...] = (10, 50, 200)
    """Values of K for Recall@K and NDCG@K; with fusion `none`, NDCG at the first one selects the best checkpoint."""
    keep_last: int = 2
    """Number of newest checkpoints that are retained, in addition to the best."""


@dataclass(frozen=True)
class Config:
    """One experiment."""

    output: str = "runs/default"
    """Run directory: log, checkpoints, predictions, metrics."""
    recipe: Literal["ranking", "retrieval"] | None = None
    """Task for which `hllm train` chooses settings from the contents of the dataset. It prints each setting with the
    reason; settings in this file or in an option take precedence. The saved configuration of the run contains the
    chosen settings, and `recipe: null`; `hllm init` writes them into a file."""
    seed: int = 0
    """Random seed of weights, shuffling, negatives and dropout."""
    resume: bool = False
    """Continue from the last complete checkpoint of `output`, or start a new run if there is none: for jobs that are
    restarted after failures."""
    start_from: str | None = None
    """Start with the weights of another run's best checkpoint (path of a run directory) or of a given checkpoint (its
    path). Tables may have more rows than in that run: known ids keep their rows. The Item LLM and the user encoder must
    be the same; other parts of the model that the other run lacks keep their initial values."""
    start_from_optimizer: bool = False
    """Also start with the state of that run's optimizers (means of gradients, Adagrad's sums), to continue training on
    newer events. The number of steps, and with it the learning rate schedule, starts at 0."""
    start_from_skip: tuple[str, ...] = ()
    """Parts of the model, such as [features, head], that keep their initial values instead of those of `start_from`:
    needed if they have another shape, or if the ids of that run are not those of this dataset."""
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
    creative: CreativeConfig = field(default_factory=CreativeConfig)
    """Creative LLM: personalized texts of items."""
    stages: tuple[StageConfig, ...] = (StageConfig(name="end to end"),)
    """Training stages, run in sequence."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizers."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallelism and precision."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation."""
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
    """Faults."""
    logs: LogsConfig = field(default_factory=LogsConfig)
    """Metric sinks in addition to the run directory."""

    def __post_init__(self) -> None:
        problems = config_problems(self)
        if problems:
            raise ConfigError(problems)
