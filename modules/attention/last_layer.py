"""Runs the last layer of a decoder only for the rows whose output is read: one of each text, that of [ITEM].

The last layer needs keys and values of every row, but queries, the output projection and the feed-forward block (most
of a layer) only of the rows that are read. Values and gradients are those of the complete layer.

A forward pre-hook does it, so no modeling code is copied: it runs the layer's own attention block once to capture keys
and values, and then lets the layer run over the read rows alone, which attend to the captured keys and values.
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
    """The plan of a fused last layer, which by itself computes outputs of `rows` [U] only (`encoders.fused_llama`)."""

    plan: WholeTextPlan
    rows: Tensor


@dataclass
class _CaptureKeysValues:
    """A `TextPlan` that captures keys and values, and computes no attention."""

    longest: int
    captured: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def limited(self, limits: ScoreLimits) -> "_CaptureKeysValues":
        return self

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        self.captured.append((key, value))
        return query.detach()  # the block needs some output; it is discarded, so it carries no gradient


@dataclass(frozen=True)
class _AttendToCaptured:
    """A `TextPlan` by which the read rows attend to the captured keys and values of all rows."""

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
    """Make the last layer honor `LastLayerRows`; any other plan runs unchanged."""
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
    # The layer will repeat the norm for the read rows; here it feeds the key and value projections of all rows.
    normed = layer.get_submodule("input_layernorm")(hidden)
    layer.get_submodule("self_attn")(hidden_states=normed, **(kwargs | {"hllm_plan": keep}))
    ((key, value),) = keep.captured
    cos, sin = kwargs["position_embeddings"]
    # From here on the packed row consists of the read rows alone, so their rotary angles must be selected with them.
    # The captured keys are rotated already.
    own = {
        "hllm_plan": _AttendToCaptured(plan.plan, key, value),
        "position_embeddings": (cos.index_select(1, plan.rows), sin.index_select(1, plan.rows)),
        "position_ids": kwargs["position_ids"].index_select(1, plan.rows),
    }
    # Selecting the layer's input also selects the residual stream.
    return (hidden.index_select(1, plan.rows),), kwargs | own
