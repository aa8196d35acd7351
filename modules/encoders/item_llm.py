"""Item LLM: an item's text becomes one embedding E (HLLM, section "Item LLM").

The input is {t_1, ..., t_m, [ITEM]}: the tokens of the text, then one learned vector. E is the last hidden
state at [ITEM], or the mean over the text's tokens (the paper's Table 10). Items are packed one after the
other; `hllm_torchrec.modules.attention.text` keeps them apart, so padding is never encoded. There is no
vocabulary head. Tokens with which many texts begin (the prompt) can be given once, as a prefix that those items
attend to: a causal model computes the same hidden states for it in front of each of them.

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
    """Work of the Item LLM.

    items; tokens: [ITEM] and a shared prefix included, the latter once; keys: that those tokens attend to, all
    together; last_keys: that the last token of each item attends to.
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
        pooling: "item" reads the learned [ITEM] vector's last hidden state; "mean" averages the text's tokens
            (an item without text is [ITEM] alone in both).
        causal: decoders True, encoders such as BERT False.
    """

    reads_text: ClassVar[bool] = True
    """Its inputs are tokens, before which nothing learns; its outputs may be cached, so averages leave it out."""

    def __init__(self, backbone: "PreTrainedModel", pooling: Pooling = "item", causal: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.causal = causal
        self.width: int = backbone.config.hidden_size
        self.attention = BackendChoice(TEXT_BACKENDS["buckets"], "runs everywhere")
        self.reads_rows = pooling == "item" and causal and supports_last_layer_rows(backbone)
        """Whether the last layer runs over the [ITEM] rows alone, which are all that is read."""
        if self.reads_rows:
            enable_last_layer_rows(backbone)
        words = backbone.get_input_embeddings().weight
        # Start where the words live: a vector of another scale would dominate the first layer's norm.
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

        prefix_ids: [P] int, tokens with which some texts begin and which `token_ids` then leaves out;
        has_prefix: [U] bool, which texts these are (not given: all).

        Raises:
            ValueError: a prefix, and the model is not causal.
        """
        if prefix_ids is None:
            prefix_ids = token_ids[:0]
        if prefix_ids.numel() and not self.causal:
            raise ArgumentError(
                f"causal: False: a shared prefix of {prefix_ids.numel()} tokens needs a causal Item LLM: an encoder's "
                "prefix sees the text behind it; give whole texts, or say causal for a decoder"
            )
        lengths = lengths_from_offsets(cu_seqlens)
        if has_prefix is None:
            has_prefix = torch.ones_like(lengths, dtype=torch.bool)
        in_front = has_prefix * prefix_ids.numel()
        is_item = torch.ones_like(lengths) if self.pooling == "item" else (lengths + in_front == 0).long()
        if lengths.numel() == 0:  # a rank without items runs every weight once: DDP's and FSDP's collectives need it
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
        """The backbone's layers: what is compiled, sharded (FSDP2) and recomputed one by one."""
        return backbone_layers(self.backbone)

    def recompute_activations(self) -> None:
        """Run each layer again in the backward pass instead of keeping its activations."""
        checkpoint_layers(self.backbone)

    def flops(self, work: EncodingCounts) -> float:
        """Operations of a forward pass; of the last layer only what is read, where it runs so."""
        tokens, config = work.tokens, self.backbone.config
        whole = backbone_flops(self.backbone, tokens, work.keys)
        if not self.reads_rows or tokens == 0:
            return whole
        layers = config.num_hidden_layers
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys_and_values = 2.0 * 2 * config.hidden_size * head * config.num_key_value_heads
        last_layer = backbone_flops(self.backbone, work.items, work.last_keys) / layers
        last_layer += keys_and_values * (tokens - work.items)
        return whole * (layers - 1) / layers + last_layer

    def _sums_of_rows(self, hidden: Tensor, has_prefix: Tensor, packing: "_Packing") -> Tensor:
        """Each item's sum over its own rows and, where it begins with the prefix, the prefix' [U, D]."""
        prefix, own = hidden.tensor_split([packing.layout.prefix])
        sums = hidden.new_zeros(has_prefix.numel(), self.width).index_add(0, packing.item_of_row, own)
        return sums + has_prefix[:, None] * prefix.sum(0)

    def _embed(self, token_ids: Tensor, cu_seqlens: Tensor, lengths: Tensor, packing: "_Packing") -> Tensor:
        """The prefix' and the texts' words, [ITEM] in the last place of every item that has it: [P + R, D].

        token_ids: [P + S], the prefix first.
        """
        words = self.backbone.get_input_embeddings()(token_ids.long())
        prefix, item = packing.layout.prefix, packing.item_of_row
        is_text = packing.place_of_row < lengths[item]
        source = torch.where(is_text, prefix + cu_seqlens[item] + packing.place_of_row, token_ids.numel())
        source = torch.cat([torch.arange(prefix, device=source.device), source])
        return torch.cat([words, self.item_token[None].to(words.dtype)]).index_select(0, source)

    def _encode(self, embedded: Tensor, layout: TextLayout, read: Tensor | None = None) -> Tensor:
        """Last hidden states [P + R, D], or those of the rows to `read` [U], each text's last."""
        whole = plan_text(layout, self.attention.backend, embedded.device)
        plan: TextPlan = whole if read is None else LastLayerRows(whole, read)
        output = self.backbone(
            inputs_embeds=embedded[None], position_ids=plan.position_ids, use_cache=False, hllm_plan=plan
        )
        return output.last_hidden_state[0]


@dataclass(frozen=True)
class _Packing:
    """Where the items' rows lie: behind the prefix, in the layout's order.

    item_of_row, place_of_row: [R] int64, whose row it is and where in that item it stands; last_rows: [U] int64,
    the row of each item's last position, P counted; order: [U] int64, the items in the layout's order.
    """

    layout: TextLayout
    order: Tensor
    item_of_row: Tensor
    place_of_row: Tensor
    last_rows: Tensor

    @staticmethod
    def of(rows: Tensor, has_prefix: Tensor, prefix: int, causal: bool) -> "_Packing":
        """For `rows` [U] of each item, not counting the prefix in front of some."""
        # Items without the prefix first, then those with it; in both, longer ones first.
        order = torch.argsort(rows - has_prefix * (rows.max() + 1), descending=True, stable=True)
        sizes = rows[order].tolist()
        layout = TextLayout(sizes, prefix, int((~has_prefix).sum()) if prefix else 0, causal)
        ends = rows[order].cumsum(0)
        item_of_row = torch.repeat_interleave(order, rows[order], output_size=sum(sizes))
        starts = torch.empty_like(ends)
        starts[order] = ends - rows[order]
        place = torch.arange(sum(sizes), device=rows.device) - starts[item_of_row]
        return _Packing(layout, order, item_of_row, place, prefix + starts + rows - 1)
