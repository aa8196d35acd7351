"""Names (`ENCODERS`) and shapes of the user encoders other than Hugging Face decoders, as plain data without torch.

A preset is a published parameterization of HSTU; fields that are set explicitly override it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

MAX_POSITIONS = 1024


@dataclass(frozen=True)
class HSTUShape:
    """Shape of an HSTU stack (`modules.hstu`). Fields of `PRESETS` that are None have the preset's value."""

    width: int
    """D, width of the residual stream, of features and of queries."""
    layers: int
    """Number of layers."""
    heads: int = 1
    """H, number of heads."""
    preset: Literal["research", "ranking"] = "research"
    """research: LayerNorms without weights, SiLU on u, q, k and v, unscaled scores, relative bias, learned positions,
    output from u * LN(a). ranking: LayerNorms with weights, SiLU on u only, scores divided by sqrt(width of a head), no
    bias, no positions, output from [u, a, u * LN(a)]."""
    qk_width: int | None = None
    """Width of a head's queries and keys; None: width / heads."""
    value_width: int | None = None
    """Width of a head's values and gates; None: width / heads."""
    affine_norm: bool | None = None
    """LayerNorms have weights."""
    projection_bias: bool | None = None
    """The projection to u, v, q and k has a bias (the output projection has one if this has none, as published)."""
    silu: Literal["all", "u"] | None = None
    """Application of SiLU: to u, v, q and k (all), or to u only."""
    scaled_scores: bool | None = None
    """q . k is divided by sqrt(qk_width)."""
    alpha: float | None = None
    """Factor of q . k; None: 1 / sqrt(qk_width) with scaled_scores, else 1."""
    relative_bias: bool | None = None
    """Add the relative bias rab to the scores: a learned number per distance in positions and per bucket of time."""
    absolute_positions: bool | None = None
    """Add a learned vector for the position to the input."""
    output: Literal["gated", "concat", "concat_norm"] | None = None
    """gated: u * LN(a); concat: [u, a, u * LN(a)]; concat_norm: [u, LN(a), u * LN(a)]."""
    group_norm: bool = False
    """LN(a) normalizes each head on its own, with one weight and one bias per head if affine_norm."""
    divide_by: int | Literal["length"] = MAX_POSITIONS
    """Divisor of a position's sum over keys: a constant (in the published code the maximum history), or the number of
    keys that the position sees. It never depends on the batch."""
    max_positions: int = MAX_POSITIONS
    """Rows of the position tables; larger relative distances share the last row."""
    time_buckets: int = 128
    """Highest bucket of time differences: min(floor(ln(max(|seconds|, 1)) / 0.301), this)."""
    time_of: Literal["event", "next"] = "event"
    """Time from which a history position measures time differences: its own, or the next event's, as in the published
    code (at serving the time of the request). A query always uses the time of its request."""
    window: int | None = None
    """Number of latest positions that a position sees, including itself; None: all."""
    prefix: int = 0
    """Number of context positions at the start of each sequence: they see one another, and all positions see them."""
    prefix_mask: Literal["context", "history"] = "context"
    """context: context positions see only one another. history: they see the complete history, a window applies to the
    context too, and all context positions count as one position in distances, as in the public code. Every later
    position then sees the future through the context, so configurations refuse it, and a model built in Python accepts
    only queries at the end of a history."""
    dropout: float = 0.0
    """Dropout before each layer's output projection, a probability."""
    stochastic_depth: float = 0.0
    """Probability p, in training, that a user skips the last layer; layer l of L is skipped with p l / L."""
    backend: Literal["auto", "eager", "compiled", "triton"] | str = "eager"
    """Name in the registry of attention backends (`modules.hstu.attention`); auto: triton on a GPU that can run it,
    else eager."""
    bounds_history: ClassVar[bool] = False
    """True if max_positions limits the length of histories. False for HSTU: larger distances share the last row."""


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
"""Field values of each preset of HSTU."""


@dataclass(frozen=True)
class SoftmaxShape:
    """Common fields of the shapes of SASRec and LiGR."""

    width: int
    """D, width of the residual stream."""
    layers: int
    """Number of layers."""
    heads: int = 1
    """H, number of heads."""
    hidden: int | None = None
    """Width of the feed-forward network; None: width in SASRec, as in its paper, and 4 x width in LiGR."""
    max_positions: int = MAX_POSITIONS
    """Rows of the table of learned positions."""
    count_from: Literal["start", "end"] = "start"
    """Origin of positions. end: the last event of a sequence has position 0, as in the public implementations. This
    encodes recency, but it tells each position how many events follow. Only without query tokens (fusion none)."""
    dropout: float = 0.0
    """Dropout of attention weights, of the feed-forward network's hidden layer and of both sublayers' outputs (in
    SASRec with norm public, not of the attention's output), a probability."""
    attention_dropout: float | None = None
    """Dropout of attention weights; None: dropout. With 0, attention can be one fused kernel also on a CPU."""


@dataclass(frozen=True)
class SASRecShape(SoftmaxShape):
    """Shape of a SASRec encoder (`modules.encoders.sasrec`)."""

    norm: Literal["public", "pre", "post"] = "public"
    """public: queries are normalized, keys and values are not, and the residual is the normalized query (the authors'
    code); pre: x + f(LN(x)) (the paper's text); post: LN(x + f(x))."""


@dataclass(frozen=True)
class LiGRShape(SoftmaxShape):
    """Shape of an encoder of LiGR layers (`modules.encoders.ligr`), as in eSASRec."""


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
    "attention_dropout": ">= 0, < 1",
    "stochastic_depth": ">= 0, < 1",
}
"""Valid ranges of the fields of shapes; fields that a shape does not have are ignored."""


@dataclass(frozen=True)
class EncoderKind:
    """A user encoder: its class, called with (shape, dropout), and its shape."""

    path: str
    """module:Name of the class."""
    shape: type
    """Dataclass of its shape."""
    bounds: Mapping[str, str] = field(default_factory=dict)
    """Valid ranges of fields that are not in `SHAPE_BOUNDS`."""


ENCODERS = {
    "hstu": EncoderKind("hllm_torchrec.modules.hstu.layer:HSTU", HSTUShape),
    "sasrec": EncoderKind("hllm_torchrec.modules.encoders.sasrec:SASRec", SASRecShape),
    "ligr": EncoderKind("hllm_torchrec.modules.encoders.ligr:LiGR", LiGRShape),
}
"""Built-in user encoders by name."""
