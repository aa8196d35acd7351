"""Item LLM: encodes an item's text as one embedding E (HLLM, section "Item LLM").

The input is {t_1, ..., t_m, [ITEM]}: the tokens of the text, then one learned vector. E is the last hidden
state at [ITEM], or the mean over the text's tokens (the paper's Table 10). Items are packed into one sequence without
padding; `hllm_torchrec.modules.attention.text` masks attention between them. There is no vocabulary head. Tokens with
which many texts begin (the prompt) can be given once, as a prefix that those items attend to: a causal model computes
the same hidden states for the prefix of each of them.

Legend: U items, S text tokens of all items (after the prefix), P tokens of the prefix, R rows of the items: S plus
one [ITEM] per item that has one, D width.
"""

import operator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.attention.last_layer import LastLayerRows, enable_last_layer_rows, supports_last_layer_rows
from hllm_torchrec.modules.attention.text import TextLayout, TextPlan
from hllm_torchrec.modules.attention.text_backends import TEXT_BACKENDS, BackendChoice, plan_text
from hllm_torchrec.modules.encoders.backbone import backbone_flops, backbone_layers, checkpoint_layers
from hllm_torchrec.modules.jagged import lengths_from_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Pooling = Literal["item", "mean"]


@dataclass(frozen=True)
class EncodingCounts:
    """Amount of work of the Item LLM.

    items: number of items; tokens: including [ITEM], and a shared prefix once; keys: total number of keys that those
    tokens attend to; last_keys: total number of keys that the last token of each item attends to.
    """

    items: int = 0
    tokens: int = 0
    keys: int = 0
    last_keys: int = 0

    def __add__(self, other: "EncodingCounts") -> "EncodingCounts":
        return EncodingCounts(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: "EncodingCounts") -> "EncodingCounts":
        return EncodingCounts(*map(operator.sub, astuple(self), astuple(other)))


class ItemLLM(nn.Module):
    """Packed token ids -> item embeddings, with any Hugging Face decoder or encoder as backbone.

    Args:
        backbone: a bare model (`AutoModel`, no head) built by `build_backbone`.
        pooling: "item": the last hidden state at the learned [ITEM] vector; "mean": the mean over the text's tokens
            (with both, an item without text consists of [ITEM] only).
        causal: decoders True, encoders such as BERT False.
    """

    reads_text: ClassVar[bool] = True
    """True: inputs are tokens, so no gradients are propagated further; outputs may be cached, so EMA excludes it."""

    def __init__(self, backbone: "PreTrainedModel", pooling: Pooling = "item", causal: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.causal = causal
        self.width: int = backbone.config.hidden_size
        self.attention = BackendChoice(TEXT_BACKENDS["buckets"], "runs everywhere")
        self.reads_rows = pooling == "item" and causal and supports_last_layer_rows(backbone)
        """True if the last layer computes outputs only for the [ITEM] rows, because no others are read."""
        if self.reads_rows:
            enable_last_layer_rows(backbone)
        words = backbone.get_input_embeddings().weight
        # Start at the mean word embedding: a vector of another scale would dominate the first layer's norm.
        self.item_token = nn.Parameter(
            words.detach().float().mean(0) if not words.is_meta else words.new_zeros(self.width)
        )

    def forward(
        self,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        prefix_ids: Tensor | None = None,
        has_prefix: Tensor | None = None,
    ) -> Tensor:
        """token_ids [S] int, cu_seqlens [U+1] int64 -> E [U, D].

        prefix_ids: [P] int, tokens with which some texts begin and which `token_ids` omits for those texts;
        has_prefix: [U] bool, True for those texts (None: all).

        Raises:
            ValueError: a prefix is given and the model is not causal.
        """
        if prefix_ids is None:
            prefix_ids = token_ids[:0]
        if prefix_ids.numel() and not self.causal:
            raise ArgumentError(
                f"causal: False: a shared prefix of {prefix_ids.numel()} tokens needs a causal Item LLM: an encoder's "
                "prefix sees the text after it; give complete texts, or set causal for a decoder"
            )
        lengths = lengths_from_offsets(cu_seqlens)
        if has_prefix is None:
            has_prefix = torch.ones_like(lengths, dtype=torch.bool)
        in_front = has_prefix * prefix_ids.numel()
        is_item = torch.ones_like(lengths) if self.pooling == "item" else (lengths + in_front == 0).long()
        # A rank without items still runs one [ITEM] row through every weight: DDP's and FSDP's collectives need it.
        if lengths.numel() == 0:
            words = self.backbone.get_input_embeddings()(token_ids.long())
            return self._encode(torch.cat([words, self.item_token[None].to(words.dtype)]), TextLayout([1]))[:0]
        packing = _Packing.of(lengths + is_item, in_front > 0, prefix_ids.numel(), self.causal)
        token_ids = torch.cat([prefix_ids, token_ids])
        embedded = self._embed(token_ids, cu_seqlens, lengths, packing)
        if self.reads_rows:
            in_order = packing.last_rows[packing.order]
            return self._encode(embedded, packing.layout, in_order).index_select(0, packing.order.argsort())
        hidden = self._encode(embedded, packing.layout)
        if self.pooling == "item":
            return hidden.index_select(0, packing.last_rows)
        return self._sums_of_rows(hidden, in_front > 0, packing) / (lengths + is_item + in_front)[:, None]

    def blocks(self) -> nn.ModuleList:
        """The backbone's layers: the units of compilation, sharding (FSDP2) and recomputation."""
        return backbone_layers(self.backbone)

    def recompute_activations(self) -> None:
        """Enable activation checkpointing: each layer runs again in the backward pass."""
        checkpoint_layers(self.backbone)

    def flops(self, work: EncodingCounts) -> float:
        """FLOPs of a forward pass; with `reads_rows` the last layer counts only for the [ITEM] rows."""
        tokens, config = work.tokens, self.backbone.config
        full = backbone_flops(self.backbone, tokens, work.keys)
        if not self.reads_rows or tokens == 0:
            return full
        layers = config.num_hidden_layers
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys_and_values = 2.0 * 2 * config.hidden_size * head * config.num_key_value_heads
        # The last layer: everything for one row per item, and keys and values for all other rows.
        last_layer = backbone_flops(self.backbone, work.items, work.last_keys) / layers
        last_layer += keys_and_values * (tokens - work.items)
        return full * (layers - 1) / layers + last_layer

    def _sums_of_rows(self, hidden: Tensor, has_prefix: Tensor, packing: "_Packing") -> Tensor:
        """Sum over each item's rows, including the prefix rows if it begins with the prefix: [U, D]."""
        prefix, item_rows = hidden.tensor_split([packing.layout.prefix])
        sums = hidden.new_zeros(has_prefix.numel(), self.width).index_add(0, packing.item_of_row, item_rows)
        return sums + has_prefix[:, None] * prefix.sum(0)

    def _embed(self, token_ids: Tensor, cu_seqlens: Tensor, lengths: Tensor, packing: "_Packing") -> Tensor:
        """Input embeddings [P + R, D]: prefix, then the items' rows; [ITEM] is the last row of each item that has it.

        token_ids: [P + S], the prefix first.
        """
        words = self.backbone.get_input_embeddings()(token_ids.long())
        prefix, item = packing.layout.prefix, packing.item_of_row
        # Rows beyond an item's text are [ITEM]: they index the vector appended after all word embeddings.
        is_text = packing.place_of_row < lengths[item]
        source = torch.where(is_text, prefix + cu_seqlens[item] + packing.place_of_row, token_ids.numel())
        source = torch.cat([torch.arange(prefix, device=source.device), source])
        return torch.cat([words, self.item_token[None].to(words.dtype)]).index_select(0, source)

    def _encode(self, embedded: Tensor, layout: TextLayout, read: Tensor | None = None) -> Tensor:
        """Last hidden states [P + R, D], or only those of the rows `read` [U], the last of each text."""
        full_plan = plan_text(layout, self.attention.backend, embedded.device)
        plan: TextPlan = full_plan if read is None else LastLayerRows(full_plan, read)
        output = self.backbone(
            inputs_embeds=embedded[None], position_ids=plan.position_ids, use_cache=False, hllm_plan=plan
        )
        return output.last_hidden_state[0]


@dataclass(frozen=True)
class _Packing:
    """Arrangement of the items' rows: after the prefix, in the layout's order.

    item_of_row, place_of_row: [R] int64, the item of each row and the row's position within it; last_rows: [U] int64,
    index of each item's last row, counting the P prefix rows; order: [U] int64, items in the layout's order.
    """

    layout: TextLayout
    order: Tensor
    item_of_row: Tensor
    place_of_row: Tensor
    last_rows: Tensor

    @staticmethod
    def of(rows: Tensor, has_prefix: Tensor, prefix: int, causal: bool) -> "_Packing":
        """Arrange items with `rows` [U] rows each, not counting the prefix."""
        # Items without the prefix first, then those with it (their key is <= -1); longer ones first in both groups.
        order = torch.argsort(rows - has_prefix * (rows.max() + 1), descending=True, stable=True)
        sizes = rows[order].tolist()
        layout = TextLayout(sizes, prefix, int((~has_prefix).sum()) if prefix else 0, causal)
        # `ends` is in the layout's order, `starts` (of each item, among the R rows) in the caller's order.
        ends = rows[order].cumsum(0)
        item_of_row = torch.repeat_interleave(order, rows[order], output_size=sum(sizes))
        starts = torch.empty_like(ends)
        starts[order] = ends - rows[order]
        place = torch.arange(sum(sizes), device=rows.device) - starts[item_of_row]
        return _Packing(layout, order, item_of_row, place, prefix + starts + rows - 1)
