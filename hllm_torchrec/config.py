"""Configuration: frozen, typed dataclasses; one YAML per experiment; dotted overrides on the command line.

jsonargparse turns the dataclasses into `--model.user.layers 2` style options, reads the YAML and prints the
resolved file (`--print_config`); it was chosen because the dataclasses stay plain, without a second schema.
What it does not do is here: unknown keys are reported all together with the nearest right name, and so are
the rules that span fields.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from hllm_torchrec.errors import ConfigError, nearest

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class DataConfig:
    """Which dataset, and what of it a sample holds."""

    dataset: str = "data/ml-100k"
    """Directory written by `hllm prepare`."""
    history: Literal["all", "positive"] = "all"
    """Which earlier events form the history: all with their action, or those with label 1 (as in the paper)."""
    max_history: int = 1024
    """A pass over a user holds at most this many events; longer users are cut into overlapping pieces, in which
    an exposure sees between max_history / 2 and max_history events (all, where there are fewer)."""
    batch_users: int = 8
    """User pieces per rank and step."""
    item_features: tuple[str, ...] = ()
    """Categorical item features of the dataset added to history, query and target, e.g. [genres]."""
    user_features: tuple[str, ...] = ()
    """Categorical user features added to queries, e.g. [gender]."""
    numeric_features: tuple[str, ...] = ()
    """Numbers computed from strictly earlier events, added to queries: see `hllm_torchrec.data.numeric`."""
    id_dropout: float = 0.0
    """Probability, in training, that an item's ID is read as unknown (0), so that cold items find a trained row."""
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


@dataclass(frozen=True)
class UserEncoderConfig:
    """The User LLM, or what stands in its place."""

    pretrained: str | None = None
    """Hugging Face directory of a decoder; its word embeddings are dropped."""
    shape: dict[str, Any] | None = None
    """Hugging Face config of a decoder with random weights, instead of `pretrained`."""
    layers: int | None = None
    """Keep the first n layers (none given: all)."""
    trainable: bool = True
    """False freezes it (the paper's Table 4)."""
    dropout: float = 0.0
    """Of the inputs, a probability."""


@dataclass(frozen=True)
class FeatureConfig:
    """ID and time features, sum-pooled with the item embedding."""

    item_id: bool = True
    """Add the item's ID embedding."""
    action: bool = True
    """Add the action's embedding (rating, click, skip) to the history."""
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


@dataclass(frozen=True)
class ObjectiveConfig:
    """L = lambda * L_gen + L_cls (Eq. 3)."""

    fusion: Literal["late", "early", "none"] = "late"
    """Where the target meets the user: in the head, or in the User LLM; `none`: generative only (Eq. 1)."""
    generative_weight: float = 0.0
    """lambda of Eq. (3); with fusion `none` the generative loss has weight 1."""
    negatives: int = 512
    """Items drawn per step from the catalogue, shared by all users and ranks of the step."""
    temperature: float = 0.05
    """Where the learnable temperature of the similarity starts (it stays >= 0.01)."""
    positive_targets_only: bool = True
    """The next item to generate is predicted only where its label is 1 (or unknown)."""
    head_hidden: int = 128
    """Width of the prediction head's hidden layer."""
    head_dropout: float = 0.0
    """In the prediction head, a probability."""
    collapse_above: float = 0.98
    """Stop when the mean cosine similarity between item embeddings passes this (all items look the same)."""


@dataclass(frozen=True)
class StageConfig:
    """A stretch of training (the paper's three stages are three of them)."""

    name: str
    """Shown in the log."""
    epochs: float = 1.0
    """Passes over the training users; fractions are allowed."""
    item_embeddings: Literal["trained", "cached"] = "trained"
    """They come from the Item LLM, with gradients, or from a cache filled when the stage begins."""
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
    table_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam"] = "rowwise_adagrad"
    """In-backward optimizer of sharded tables; the last two run on CUDA only. Tables step at every micro-batch,
    unclipped, whatever `accumulate` and `clip_norm` say: their update happens inside the backward pass."""
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


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training, and the checkpoint that is kept."""

    every: float = 1.0
    """Epochs between evaluations on the validation part."""
    patience: int = 0
    """Stop after this many evaluations without a better AUC (or NDCG@10); 0: never."""
    batch_users: int = 16
    """User pieces per rank and step."""
    retrieval: bool = False
    """Also Recall@K and NDCG@K over the whole catalogue (needs the generative loss)."""
    ks: tuple[int, ...] = (10, 50, 200)
    """K of Recall@K and NDCG@K."""
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
    """Continue from the last complete checkpoint of `output`."""
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

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError(problems)


def _problems(config: Config) -> list[str]:
    """Every broken rule, as 'field: value: rule; remedy'."""
    c, found = config, []

    def check(holds: bool, message: str) -> None:
        if not holds:
            found.append(message)

    backbones = [("user", c.user.pretrained, c.user.shape)]
    if c.item_llm.enabled:
        backbones.append(("item_llm", c.item_llm.pretrained, c.item_llm.shape))
    for name, pretrained, shape in backbones:
        check(
            (pretrained is None) != (shape is None),
            f"{name}: pretrained={pretrained!r}, shape={shape!r}: give one of them (weights, or a shape for random ones)",
        )
    check(c.data.max_history >= 2, f"data.max_history: {c.data.max_history}: must be at least 2")
    check(c.data.batch_users >= 1, f"data.batch_users: {c.data.batch_users}: must be at least 1")
    check(0 <= c.data.id_dropout < 1, f"data.id_dropout: {c.data.id_dropout}: must be in [0, 1)")
    check(0 <= c.features.time_depth <= 6, f"features.time_depth: {c.features.time_depth}: must be 0 (off) to 6 (second)")
    check(c.objective.generative_weight >= 0, f"objective.generative_weight: {c.objective.generative_weight}: must be >= 0")
    check(c.objective.temperature >= 0.01, f"objective.temperature: {c.objective.temperature}: must be at least 0.01")
    check(c.objective.negatives >= 1, f"objective.negatives: {c.objective.negatives}: must be at least 1")
    check(bool(c.stages), "stages: empty: give at least one, e.g. [{name: end to end, epochs: 1}]")
    for i, stage in enumerate(c.stages):
        check(stage.epochs > 0, f"stages[{i}].epochs: {stage.epochs}: must be above 0")
    check(c.optim.accumulate >= 1, f"optim.accumulate: {c.optim.accumulate}: must be at least 1")
    check(c.item_llm.enabled or c.features.item_id, "features.item_id: false while item_llm.enabled is false: items would have no features")
    generates = c.objective.fusion == "none" or c.objective.generative_weight > 0
    check(
        not generates or c.item_llm.enabled,
        "objective.generative_weight: above 0 while item_llm.enabled is false: the target of L_gen is the Item LLM's embedding",
    )
    check(not c.evaluation.retrieval or generates, "evaluation.retrieval: true without a generative loss: set objective.generative_weight above 0")
    return found


def load_config(arguments: list[str]) -> Config:
    """Parse `--config FILE` and dotted overrides, e.g. ["--config", "configs/quickstart.yaml", "--seed", "1"].

    `--print_config` prints the resolved configuration and exits.

    Raises:
        ConfigError: unknown keys (all of them, each with the nearest right name), wrong types, broken rules.
    """
    parser = ArgumentParser(prog="train.py", exit_on_error=False, description="Train a hybrid HLLM.")
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(Config, nested_key=None, fail_untyped=True)
    unknown = _unknown_in_files(arguments) + _unknown_options(arguments)
    if unknown:
        raise ConfigError(unknown)
    try:
        return _build(Config, parser.parse_args(arguments))
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse raises its own ArgumentError with the dotted field in the text
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ConfigError):
            raise cause from None
        raise ConfigError([" ".join(str(error).split())]) from None


def _build(cls: type, value: Any) -> Any:
    """Namespace or dict -> dataclass, recursively."""
    if dataclasses.is_dataclass(value):
        return value
    data = vars(value) if isinstance(value, Namespace) else dict(value)
    kinds = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for name, entry in data.items():
        if name not in kinds:
            continue
        kind = kinds[name].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            entry = _build(kind, entry)
        elif name == "stages":
            entry = tuple(_build(StageConfig, stage) for stage in entry)
        elif isinstance(entry, list):
            entry = tuple(entry)
        elif isinstance(entry, Namespace):
            entry = vars(entry)
        built[name] = entry
    return cls(**built)


def _unknown_in_files(arguments: list[str]) -> list[str]:
    problems = []
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        path = value if option == "--config" else option.removeprefix("--config=") if option.startswith("--config=") else None
        if path is None:
            continue
        if not Path(path).is_file():
            problems.append(f"--config: {path}: no such file")
            continue
        try:
            content = yaml.safe_load(Path(path).read_text()) or {}
        except yaml.YAMLError as error:
            problems.append(f"{path}: not valid YAML: {' '.join(str(error).split())}")
            continue
        problems += [f"{path}: {problem}" for problem in unknown_keys(content, Config)]
    return problems


def unknown_keys(content: Any, cls: type, prefix: str = "") -> list[str]:
    """Keys of a nested mapping that the dataclass has not, each as 'a.b: unknown key; did you mean ...'."""
    if not isinstance(content, dict):
        return [f"{prefix.rstrip('.') or 'file'}: {content!r}: must be a mapping of {cls.__name__} fields"]
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    problems = []
    for key, value in content.items():
        kind = kinds.get(key)
        if kind is None:
            problems.append(f"{prefix}{key}: unknown key{nearest(str(key), kinds)}")
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            problems += unknown_keys(value, kind, f"{prefix}{key}.")
        elif key == "stages" and isinstance(value, list):
            for i, stage in enumerate(value):
                problems += unknown_keys(stage, StageConfig, f"stages[{i}].")
    return problems


def _unknown_options(arguments: list[str]) -> list[str]:
    known = {"config", "print_config", "help", *_dotted(Config)}
    problems = []
    for argument in arguments:
        if argument.startswith("--") and argument != "--":
            name = argument[2:].split("=")[0].removesuffix("+")
            if name not in known and not any(name.startswith(f"{k}.") for k in known if k.endswith("shape")):
                problems.append(f"--{name}: unknown option{nearest(name, known)}")
    return problems


def _dotted(cls: type, prefix: str = "") -> list[str]:
    names = []
    for f in dataclasses.fields(cls):
        names.append(prefix + f.name)
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            names += _dotted(f.type, f"{prefix}{f.name}.")
    return names


def to_dict(config: Any) -> Any:
    """The configuration as plain dicts and lists (JSON and YAML)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_dict(entry) for entry in config] if isinstance(config, tuple) else config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def config_from_file(path: Path) -> Config:
    """Read a resolved configuration (written by `save_config`)."""
    return load_config(["--config", str(path)])
