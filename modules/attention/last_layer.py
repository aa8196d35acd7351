"""The last layer of a decoder for the rows that are read alone: the Item LLM reads one row of each text, [ITEM]'s.

Keys and values of the last layer are needed of every row; queries, the output projection and the feed-forward block,
which are most of a layer, only of the rows that are read. The values and gradients are those of the whole layer.

A hook in front of the layer does it, so no modelling code is copied: it runs the layer's own attention block once to
get keys and values, and then lets the layer run over the rows alone, whose attention looks at the kept ones.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hllm_torchrec.modules.attention.text import WholeTextPlan


@dataclass(frozen=True)
class LastLayerRows:
    """A `TextPlan` of which the last layer's output is wanted at `rows` [U] int64 only, the last row of each text."""

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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`: all layers but the last."""
        return self.plan.attend(query, key, value, scaling, dropout)


@dataclass
class _CaptureKeysValues:
    """Keeps keys and values, and attends to nothing."""

    longest: int
    captured: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        self.captured.append((key, value))
        return query.detach()  # nobody reads what becomes of it


@dataclass(frozen=True)
class _AttendToCaptured:
    """The rows that are read attend to the keys and values that were kept, not to their own alone."""

    plan: WholeTextPlan
    key: Tensor
    value: Tensor

    @property
    def longest(self) -> int:
        return self.plan.longest

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        return self.plan.attend_last(query, self.key, self.value, scaling, dropout)


def supports_last_layer_rows(backbone: nn.Module) -> bool:
    """Whether the backbone's last layer is of the kind that the hook knows: Llama's and its many relatives'."""
    layers = getattr(backbone, "layers", None)
    if layers is None or not hasattr(backbone, "rotary_emb"):
        return False
    return hasattr(layers[-1], "input_layernorm") and hasattr(layers[-1], "self_attn")


def enable_last_layer_rows(backbone: nn.Module) -> None:
    """Make the last layer obey `LastLayerRows`; with any other plan it runs as ever."""
    backbone.layers[-1].register_forward_pre_hook(_last_layer_hook, with_kwargs=True)  # type: ignore[index, union-attr]


def _last_layer_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plan = kwargs.get("hllm_plan")
    if not isinstance(plan, LastLayerRows):
        return None
    (hidden,) = args
    keep = _CaptureKeysValues(plan.longest)
    normed = layer.get_submodule("input_layernorm")(hidden)
    layer.get_submodule("self_attn")(hidden_states=normed, **(kwargs | {"hllm_plan": keep}))
    ((key, value),) = keep.captured
    cos, sin = kwargs["position_embeddings"]
    own = {
        "hllm_plan": _AttendToCaptured(plan.plan, key, value),
        "position_embeddings": (cos.index_select(1, plan.rows), sin.index_select(1, plan.rows)),
        "position_ids": kwargs["position_ids"].index_select(1, plan.rows),
    }
    return (hidden.index_select(1, plan.rows),), kwargs | own
