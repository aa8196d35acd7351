"""User encoders other than Hugging Face decoders: their names (`ENCODERS`) and shapes, as plain data without torch.

A preset names a published parameterisation; every field that it decides may be given as well, and then counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

MAX_POSITIONS = 1024


@dataclass(frozen=True)
class HSTUShape:
    """An HSTU stack (`modules.hstu`). Fields that are None are as the preset has them."""

    width: int
    """D of the residual stream: that of features and queries."""
    layers: int
    """Number of layers."""
    heads: int = 1
    """H."""
    preset: Literal["research", "ranking"] = "research"
    """research: LayerNorms without weights, SiLU on u, q, k and v, scores as they are, relative bias, learned
    positions, u * LN(a). ranking: LayerNorms with weights, SiLU on u alone, scores over sqrt(width of a head),
    no bias, no positions, the output reads [u, a, u * LN(a)]."""
    qk_width: int | None = None
    """Of a head's queries and keys; None: width / heads."""
    value_width: int | None = None
    """Of a head's values and gates; None: width / heads."""
    affine_norm: bool | None = None
    """LayerNorms have weights."""
    projection_bias: bool | None = None
    """The projection to u, v, q and k has a bias (the output's has one where this has none, as published)."""
    silu: Literal["all", "u"] | None = None
    """What of u, v, q and k goes through SiLU."""
    scaled_scores: bool | None = None
    """q . k is divided by sqrt(qk_width)."""
    relative_bias: bool | None = None
    """Add rab: a learned number for the distance in positions and one for the distance in time."""
    absolute_positions: bool | None = None
    """Add a learned vector for the position to the input."""
    output: Literal["gated", "concat"] | None = None
    """gated: u * LN(a); concat: [u, a, u * LN(a)]."""
    divide_by: int | Literal["length"] = MAX_POSITIONS
    """What a position's sum over keys is divided by: a constant (the published code: the longest history), or
    the number of keys that the position itself sees. Never anything of the batch."""
    max_positions: int = MAX_POSITIONS
    """Rows of the position tables; relative distances beyond share the last one."""
    time_buckets: int = 128
    """Time distances fall into buckets 0 to this: floor(ln(max(seconds, 1)) / 0.301)."""
    time_of: Literal["event", "next"] = "event"
    """Whose time a history position asks at: its own, or the next event's, which the published code knows (at
    serving it is the time of the request). Queries always ask at their request's time."""
    window: int | None = None
    """A position sees this many latest positions, itself included; None: all."""
    prefix: int = 0
    """The first positions of every sequence that are context: they see one another, and every one sees them."""
    dropout: float = 0.0
    """Before each layer's output projection, a probability."""
    stochastic_depth: float = 0.0
    """Probability, in training, that a user skips the last layer; layer l of L is skipped with l / L of it."""
    backend: Literal["auto", "eager", "compiled", "triton"] | str = "eager"
    """Name in the registry of attention backends (`modules.pointwise_attention`); auto: triton on CUDA, else
    eager."""
    bounds_history: ClassVar[bool] = False
    """Whether histories may be no longer than max_positions: relative distances beyond share the table's last row."""


PRESETS: dict[str, dict[str, Any]] = {
    "research": {
        "affine_norm": False,
        "projection_bias": False,
        "silu": "all",
        "scaled_scores": False,
        "relative_bias": True,
        "absolute_positions": True,
        "output": "gated",
    },
    "ranking": {
        "affine_norm": True,
        "projection_bias": True,
        "silu": "u",
        "scaled_scores": True,
        "relative_bias": False,
        "absolute_positions": False,
        "output": "concat",
    },
}
"""What each preset of HSTU stands for."""


@dataclass(frozen=True)
class SoftmaxShape:
    """What SASRec and LiGR have in common."""

    width: int
    """D."""
    layers: int
    """Number of layers."""
    heads: int = 1
    """H."""
    hidden: int | None = None
    """Width of the feed-forward part; None: width in SASRec, as in its paper, and 4 x width in LiGR."""
    max_positions: int = MAX_POSITIONS
    """Rows of the table of learned positions."""
    count_from: Literal["start", "end"] = "start"
    """Where positions count from. end: the last event of a pass is 0, as in the public implementations, which
    tells recency but lets a position know how many events follow; only without query tokens (fusion none)."""
    dropout: float = 0.0
    """Of attention weights and of both sublayers' outputs, a probability."""
    attention_dropout: float | None = None
    """Of attention weights; None: dropout. Without it (0) the attention can be one fused kernel on a CPU, too."""


@dataclass(frozen=True)
class SASRecShape(SoftmaxShape):
    """A SASRec encoder (`modules.sasrec`)."""

    norm: Literal["public", "pre", "post"] = "public"
    """public: queries are normed, keys and values are not, and the residual is the normed query (the authors'
    code); pre: x + f(LN(x)) (the paper's text); post: LN(x + f(x))."""


@dataclass(frozen=True)
class LiGRShape(SoftmaxShape):
    """An encoder of LiGR layers (`modules.ligr`), as in eSASRec."""


def attention_dropout(shape: SoftmaxShape) -> float:
    """Dropout of attention weights, a probability."""
    return shape.dropout if shape.attention_dropout is None else shape.attention_dropout


SHAPE_BOUNDS = {
    "width": ">= 1",
    "layers": ">= 1",
    "heads": ">= 1",
    "hidden": ">= 1",
    "qk_width": ">= 1",
    "value_width": ">= 1",
    "max_positions": ">= 1",
    "time_buckets": ">= 1",
    "window": ">= 1",
    "prefix": ">= 0",
    "dropout": ">= 0, < 1",
    "stochastic_depth": ">= 0, < 1",
}
"""Ranges of a shape's fields, for those of these that it has."""


@dataclass(frozen=True)
class EncoderKind:
    """A user encoder: its class, called with (shape, dropout), and its shape."""

    path: str
    """module:Name of the class."""
    shape: type
    """The dataclass of its sizes."""
    bounds: Mapping[str, str] = field(default_factory=dict)
    """Ranges of fields that `SHAPE_BOUNDS` does not have."""


ENCODERS = {
    "hstu": EncoderKind("hllm_torchrec.modules.hstu.layer:HSTU", HSTUShape),
    "sasrec": EncoderKind("hllm_torchrec.modules.encoders.sasrec:SASRec", SASRecShape),
    "ligr": EncoderKind("hllm_torchrec.modules.encoders.ligr:LiGR", LiGRShape),
}
"""Name of an encoder -> what it is."""
