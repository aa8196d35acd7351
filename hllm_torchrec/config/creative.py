"""Configuration of personalized texts of items (HLLM-Creator, arXiv 2508.18118), and its rules."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hllm_torchrec.config.lora import LoRAConfig

if TYPE_CHECKING:
    from hllm_torchrec.config.schema import Config

USER = "{user}"
"""Placeholder of the soft tokens in a prompt."""
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class SoftPromptConfig:
    """The user vector as soft tokens of the Creative LLM."""

    tokens: int = 1
    """Number of soft tokens."""
    hidden: int = 0
    """Width of the projection's hidden layer; 0: one linear layer without bias, as published."""
    scale: Literal["words", "none"] = "words"
    """words: soft tokens are multiplied by a learned gain, which is initialized to the RMS of the word embeddings, and
    RMS-normalized before that if `normalize` is none; none: neither, as published."""
    normalize: Literal["none", "standardize", "whiten"] = "none"
    """Normalization of user vectors, as `item_llm.standardise` and `item_llm.whiten` normalize item embeddings. It
    subtracts the mean user vector, which would otherwise make the soft tokens of all users nearly the same. The
    statistics are measured before the first step. Training then subtracts the mean of a batch's users, and evaluation
    the running mean of these means. none: no normalization, as published."""
    text_decay: float = 0.0
    """Above 0: the mean text embedding of the items in the history is appended to the user vector (late fusion). An
    event is weighted by the share of positive labels among events with its action, times this factor for each later
    event. Reason: the user vector of a run that was trained to rank holds little information about the topics of the
    user's likes."""
    dropout: float = 0.15
    """Probability in training that the learned tokens of unknown users (null) replace the user's soft tokens. So null
    is trained both for unknown users and as the baseline of `creative_gap`."""


@dataclass(frozen=True)
class CreativeLossConfig:
    """Weights of the losses; 0 leaves a loss out."""

    write: float = 1.0
    """Weight of the cross-entropy of the response, per token."""
    match: float = 0.0
    """Weight of the Item-User Predictor's binary cross-entropy: the creative's item against sampled items."""
    recon: float = 0.0
    """Weight of the cross-entropy, per token, of the user's profile (a column of the table) given the user vector."""
    align: float = 0.0
    """Weight of the contrastive loss between user vectors and the Creative LLM's representations of the users'
    profiles. Negatives are the rows of other users in the step, on all ranks."""

    @property
    def read_profiles(self) -> bool:
        """True if a loss reads profiles."""
        return self.recon > 0 or self.align > 0


@dataclass(frozen=True)
class MatchConfig:
    """The Item-User Predictor."""

    kind: Literal["mixer", "mlp"] = "mixer"
    """mixer: MLP-Mixer blocks over the two tokens (user, item), as published; mlp: an MLP on their concatenation."""
    width: int = 128
    """Width of both tokens (2,048 in the published model)."""
    blocks: int = 2
    """Number of mixer blocks, or of hidden layers of the MLP."""
    negatives: int = 8
    """Number of items sampled per micro-batch, the same for all users and ranks. Items of a user's own sequence or
    creatives are not negatives of this user."""


@dataclass(frozen=True)
class ProfileConfig:
    """Profiles: texts about users' interests in the table's column `profile`, read by `losses.recon` and
    `losses.align`."""

    prompt: str = "Interests of this user:{user}"
    """Prompt before a profile in `losses.recon`. It contains {user} exactly once, where the soft token is inserted."""
    max_length: int = 256
    """Maximum number of tokens of a profile, including the end token. A longer profile is truncated and has no end
    token."""
    temperature: float = 0.05
    """Initial value of the learned temperature of `losses.align`."""


@dataclass(frozen=True)
class CreativeConfig:
    """Personalized texts of items, written by a causal language model that reads a user vector as soft tokens."""

    enabled: bool = False
    """Train on the table `data`. Such a run trains only the losses below, in forward passes over the table's users. It
    needs late fusion (the user vector is the [USER] output) or fusion none (the hidden state of the last position)."""
    data: str = ""
    """Name of a table of `hllm creatives`: <dataset>/creatives/<name>."""
    pretrained: str | None = None
    """Hugging Face directory of a decoder with tokenizer."""
    tokenizer: str | None = None
    """Tokenizer directory, if it is not in the directory of the weights."""
    shape: dict[str, Any] | None = None
    """Hugging Face config of a decoder with random weights, instead of `pretrained`."""
    layers: int | None = None
    """Number of layers to keep, from the first on; null: all."""
    trainable: bool = True
    """False: the Creative LLM is frozen; all other parts, such as the soft prompt, are trained as usual."""
    freeze_words: bool = False
    """Freeze the word embeddings and the vocabulary head."""
    attention: Literal["auto", "buckets", "varlen", "flash", "flex"] = "auto"
    """Kernel, as `item_llm.attention`."""
    prompt: str = "{user}{title}\n"
    """Text before the response. It contains {user} exactly once, where the soft tokens are inserted. Every other name
    in braces is a text column of the dataset, or source, description or profile of the table."""
    max_prompt_length: int = 1024
    """Maximum number of tokens of a prompt, without soft tokens."""
    max_response_length: int = 128
    """Maximum number of tokens of a response, including the end token. A longer response is truncated and has no end
    token."""
    over_long: Literal["error", "drop"] = "error"
    """Handling of a prompt that is longer than max_prompt_length. error: stop with an error; drop: leave the creative
    out, and count it."""
    per_batch: int = 32
    """Maximum number of creatives per rank and micro-batch, on average over the ranks."""
    evaluated: int = 512
    """Number of creatives of the validation part, spaced evenly, that an evaluation during training scores; 0: all."""
    soft: SoftPromptConfig = field(default_factory=SoftPromptConfig)
    """Soft tokens."""
    losses: CreativeLossConfig = field(default_factory=CreativeLossConfig)
    """Losses."""
    match: MatchConfig = field(default_factory=MatchConfig)
    """Item-User Predictor."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Profiles of users."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters trained instead of the Creative LLM's base weights."""

    @property
    def has_backbone(self) -> bool:
        """True if there is a Creative LLM."""
        return self.enabled

    @property
    def columns(self) -> tuple[str, ...]:
        """Distinct names in braces in the prompt, without {user}."""
        return tuple(dict.fromkeys(name for name in PLACEHOLDER.findall(self.prompt) if name != USER[1:-1]))


CREATIVE_BOUNDS = {
    "creative.layers": ">= 1",
    "creative.max_prompt_length": ">= 1",
    "creative.max_response_length": ">= 2",
    "creative.per_batch": ">= 1",
    "creative.evaluated": ">= 0",
    "creative.soft.tokens": ">= 1",
    "creative.soft.hidden": ">= 0",
    "creative.soft.text_decay": ">= 0, <= 1",
    "creative.soft.dropout": ">= 0, <= 1",
    "creative.losses.write": ">= 0",
    "creative.losses.match": ">= 0",
    "creative.losses.recon": ">= 0",
    "creative.losses.align": ">= 0",
    "creative.profile.max_length": ">= 2",
    "creative.profile.temperature": ">= 0.01",
    "creative.match.width": ">= 1",
    "creative.match.blocks": ">= 1",
    "creative.match.negatives": ">= 1",
}


def creative_problems(config: "Config") -> Iterator[str]:
    """Yield a message for each broken rule of `creative`, as 'field: value: rule; remedy'."""
    creative = config.creative
    if not creative.enabled:
        if any(stage.trains == "creative" for stage in config.stages):
            yield (
                "stages: trains 'creative' with creative.enabled false: there is no Creative LLM to train; write "
                "trains: all"
            )
        return
    if not re.fullmatch(r"[\w-][\w.-]*", creative.data):
        yield (
            f"creative.data: {creative.data!r}: must be the name of a table: letters, digits, '-', '_' and '.', and "
            "not begin with '.'; make one with `hllm creatives build`"
        )
    if config.objective.fusion == "early":
        yield (
            "creative.enabled: true with objective.fusion 'early': a user vector would depend on a target; write late "
            "or none"
        )
    if len(config.objective.tasks) > 1:
        yield (
            "creative.enabled: true with several objective.tasks: its batches have no exposures, and their heads would "
            "not be trained; leave objective.tasks out"
        )
    if creative.soft.text_decay and (
        config.objective.fusion != "late" or not config.item_llm.enabled or config.user.actions == "interleaved"
    ):
        yield (
            f"creative.soft.text_decay: {creative.soft.text_decay}: needs item_llm.enabled, objective.fusion late, and "
            "user.actions other than interleaved; write 0"
        )
    if creative.prompt.count(USER) != 1:
        yield f"creative.prompt: {creative.prompt!r}: must have {USER} exactly once: the place of the soft tokens"
    if creative.losses.read_profiles and PLACEHOLDER.findall(creative.profile.prompt) != [USER[1:-1]]:
        yield (
            f"creative.profile.prompt: {creative.profile.prompt!r}: must have {USER} exactly once, and no other "
            "name in braces"
        )
    if not any(vars(creative.losses).values()):
        yield "creative.losses: all are 0: nothing would be trained; give one a weight"
    if creative.losses.match and not config.item_llm.enabled:
        yield (
            f"creative.losses.match: {creative.losses.match}: the predictor reads text embeddings, and "
            "item_llm.enabled is false; write 0"
        )
