"""Computes the last layer of a decoder only for the rows whose output is read: the last row of each text ([ITEM]).

The last layer needs keys and values of every row, but queries, the output projection and the feed-forward block (most
of a layer) only of the rows that are read. Values and gradients are those of the complete layer.

This is implemented by a forward pre-hook, so no modeling code is copied: the hook runs the layer's own attention block
once to capture keys and values. Then the layer runs over the read rows alone, and these rows attend to the captured
keys and values.

Legend: S packed rows, U texts.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from hllm_torchrec.modules.attention.text import ScoreLimits, WholeTextPlan


@dataclass(frozen=True)
class LastLayerRows:
    """A `TextPlan` whose last layer computes only `rows` [U] int64, the last row of each text."""

    plan: WholeTextPlan
    rows: Tensor

    @property
    def position_ids(self) -> Tensor:
        """[1, S] int64."""
        return self.plan.position_ids

    @property
    def longest(self) -> int:
        """See `TextPlan`."""
        return self.plan.longest

    def limited(self, limits: ScoreLimits) -> "LastLayerRows":
        """See `LimitedPlan`."""
        return replace(self, plan=self.plan.limited(limits))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; used by all layers but the last."""
        return self.plan.attend(query, key, value, scaling, dropout)


@dataclass(frozen=True)
class ReadRows:
    """Plan of a fused last layer (`encoders.fused_llama`), which computes only the outputs of `rows` [U] by itself."""

    plan: WholeTextPlan
    rows: Tensor


@dataclass
class _CaptureKeysValues:
    """A `TextPlan` that captures keys and values and does not compute attention."""

    longest: int
    captured: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def limited(self, limits: ScoreLimits) -> "_CaptureKeysValues":
        return self

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        self.captured.append((key, value))
        return query.detach()  # the block needs an output of this shape; it is discarded


@dataclass(frozen=True)
class _AttendToCaptured:
    """A `TextPlan` with which the read rows attend to the captured keys and values of all rows."""

    plan: WholeTextPlan
    key: Tensor
    value: Tensor

    @property
    def longest(self) -> int:
        return self.plan.longest

    def limited(self, limits: ScoreLimits) -> "_AttendToCaptured":
        return replace(self, plan=self.plan.limited(limits))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        return self.plan.attend_last(query, self.key, self.value, scaling, dropout)


def supports_last_layer_rows(backbone: nn.Module) -> bool:
    """Return whether the hook supports the backbone's last layer: Llama's structure, as in most decoders."""
    layers = getattr(backbone, "layers", None)
    if layers is None or not hasattr(backbone, "rotary_emb"):
        return False
    return hasattr(layers[-1], "input_layernorm") and hasattr(layers[-1], "self_attn")


def enable_last_layer_rows(backbone: nn.Module) -> None:
    """Make the last layer compute only the rows of a `LastLayerRows`; other plans run unchanged."""
    backbone.layers[-1].register_forward_pre_hook(_last_layer_hook, with_kwargs=True)  # type: ignore[index, union-attr]


def _last_layer_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plan = kwargs.get("hllm_plan")
    if not isinstance(plan, LastLayerRows):
        return None
    (hidden,) = args
    runs_fused = getattr(layer, "runs_fused", None)
    if runs_fused is not None and runs_fused(hidden, plan):
        return args, kwargs | {"hllm_plan": ReadRows(plan.plan, plan.rows)}
    keep = _CaptureKeysValues(plan.longest)
    # The key and value projections need the norm of all rows; the layer then repeats the norm for the read rows.
    normed = layer.get_submodule("input_layernorm")(hidden)
    layer.get_submodule("self_attn")(hidden_states=normed, **(kwargs | {"hllm_plan": keep}))
    ((key, value),) = keep.captured
    cos, sin = kwargs["position_embeddings"]
    # The layer's input consists of the read rows alone, so their rotary angles must be selected, too. The captured keys
    # are already rotated.
    own = {
        "hllm_plan": _AttendToCaptured(plan.plan, key, value),
        "position_embeddings": (cos.index_select(1, plan.rows), sin.index_select(1, plan.rows)),
        "position_ids": kwargs["position_ids"].index_select(1, plan.rows),
    }
    # Selecting the layer's input also selects the residual stream.
    return (hidden.index_select(1, plan.rows),), kwargs | own
