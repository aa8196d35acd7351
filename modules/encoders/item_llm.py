"""Item LLM: encodes an item's text as one embedding E (HLLM, section "Item LLM").

The input is {t_1, ..., t_m, [ITEM]}: the tokens of the text, then one learned vector. E is the last hidden state at
[ITEM], the mean of the last hidden states of the text's tokens (the paper's Table 10), or the last hidden state of the
first or last token, as in text embedding models. Items are packed into one sequence without padding, and
`hllm_torchrec.modules.attention.text` masks attention between them. Models whose attention cannot be replaced read
batches of texts of similar or equal lengths instead (`TextReading`). There is no vocabulary head. If many texts begin
with the same tokens (the prompt), these can be given once, as a prefix to which those items attend: a causal model
computes the same hidden states for the prefix of every text.

Legend: U items, S text tokens of all items (after the prefix), P tokens of the prefix, D width, R rows of the items: S
plus one for each item with an [ITEM].
"""

import operator
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.attention.last_layer import LastLayerRows, enable_last_layer_rows, supports_last_layer_rows
from hllm_torchrec.modules.attention.text import TextLayout, TextPlan, padded_rows, plan_buckets
from hllm_torchrec.modules.attention.text_backends import TEXT_BACKENDS, BackendChoice, plan_text
from hllm_torchrec.modules.attention.text_packing import TextPacking
from hllm_torchrec.modules.encoders.backbone import (
    BackboneModule,
    TextReading,
    backbone_flops,
    learned_positions,
)
from hllm_torchrec.modules.jagged import lengths_from_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Pooling = Literal["item", "mean", "cls", "last"]


@dataclass(frozen=True)
class EncodingCounts:
    """Numbers of items, tokens and keys that the Item LLM processes, from which its FLOPs are computed.

    tokens: including [ITEM]; a shared prefix is counted once; keys: number of keys to which a token attends, summed
    over the tokens; last_keys: the same, summed over the last token of each item.
    """

    items: int = 0
    tokens: int = 0
    keys: int = 0
    last_keys: int = 0

    def __add__(self, other: "EncodingCounts") -> "EncodingCounts":
        return EncodingCounts(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: "EncodingCounts") -> "EncodingCounts":
        return EncodingCounts(*map(operator.sub, astuple(self), astuple(other)))


class ItemLLM(BackboneModule, nn.Module):
    """Packed token ids -> item embeddings, with any Hugging Face decoder or encoder as backbone.

    Args:
        backbone: a bare model (`AutoModel`, no head) built by `build_backbone`.
        pooling: last hidden state that becomes E: "item": that of the learned [ITEM] vector; "mean": the mean over the
            text's tokens; "cls": that of the first token; "last": that of the last token. An item without text
            consists of [ITEM] only, with every pooling.
        causal: True for decoders, False for encoders such as BERT; None: as `build_backbone` detected.
        normalize: scale E to an L2 norm of 1.
    """

    reads_text: ClassVar[bool] = True
    """True: inputs are tokens, so gradients end here; outputs may be cached, so EMA excludes this module."""

    def __init__(
        self,
        backbone: "PreTrainedModel",
        pooling: Pooling = "item",
        causal: bool | None = None,
        *,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.normalize = normalize
        reading: TextReading = getattr(backbone, "hllm_reading", TextReading())
        self.arrangement = reading.arrangement
        self.causal = reading.causal if causal is None else causal
        self.is_turned = reading.is_turned or self.causal != reading.causal
        if self.causal != reading.causal and self.arrangement != "packed":
            raise ArgumentError(
                f"causal: {causal}: {backbone.config.model_type} cannot be packed, and the unpatched model has causal: "
                f"{reading.causal}; leave the option out"
            )
        self.width: int = backbone.config.hidden_size
        self.first_position = first_position(backbone)
        """Position of a text's first token: RoBERTa and its relatives count from padding_idx + 1."""
        self.attention = BackendChoice(TEXT_BACKENDS["buckets"], "runs everywhere")
        reads_last = pooling in ("item", "last") and self.causal and self.arrangement == "packed"
        self.reads_rows = reads_last and supports_last_layer_rows(backbone)
        """True if the last layer computes outputs only for the last row of each text, because no others are read."""
        if self.reads_rows:
            enable_last_layer_rows(backbone)
        words = backbone.get_input_embeddings()
        start = words.weight.new_zeros(words.weight.shape[1])
        if not words.weight.is_meta:
            # Start at the mean word embedding: with a larger scale, [ITEM] would dominate the first layer's norm.
            start = words.weight.detach().float().mean(0) * getattr(words, "scalar_embed_scale", 1.0)
        self.item_token = nn.Parameter(start)

    @property
    def shares_prefix(self) -> bool:
        """True if a prefix can be given once: the model is causal, reads packed texts, and its pooling is not "last".

        With pooling "last", a text that consists of the prefix alone would have no row from which to read E.
        """
        return self.causal and self.arrangement == "packed" and self.pooling != "last"

    def forward(
        self,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        prefix_ids: Tensor | None = None,
        has_prefix: Tensor | None = None,
    ) -> Tensor:
        """Encode token_ids [S] int with offsets cu_seqlens [U+1] int64: E [U, D].

        prefix_ids: [P] int, tokens with which some texts begin, and which `token_ids` does not repeat for these texts;
        has_prefix: [U] bool, True for the texts that begin with the prefix (None: all).

        Raises:
            ValueError: a prefix is given, and `shares_prefix` is False.
        """
        if prefix_ids is None:
            prefix_ids = token_ids[:0]
        if prefix_ids.numel() and not self.shares_prefix:
            raise ArgumentError(
                f"causal: {self.causal}: a shared prefix of {prefix_ids.numel()} tokens needs a causal Item LLM with "
                f"packed texts and another pooling than last (this is {self.arrangement}, {self.pooling}); give "
                "complete texts"
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
        packing = TextPacking.of(lengths + is_item, in_front > 0, prefix_ids.numel(), self.causal)
        token_ids = torch.cat([prefix_ids, token_ids])
        embedded = self._embed(token_ids, cu_seqlens, lengths, packing)
        if self.reads_rows:
            in_order = packing.last_rows[packing.order]
            rows = self._encode(embedded, packing.layout, in_order).index_select(0, packing.order.argsort())
        else:
            hidden = self._encode(embedded, packing.layout)
            rows = self._pooled(hidden, lengths + is_item + in_front, in_front > 0, packing)
        return nn.functional.normalize(rows, dim=-1) if self.normalize else rows

    def _pooled(self, hidden: Tensor, lengths: Tensor, has_prefix: Tensor, packing: TextPacking) -> Tensor:
        """E [U, D] of the items from the hidden states [P + R, D]; lengths: [U], including prefix and [ITEM]."""
        if self.pooling == "mean":
            return self._sums_of_rows(hidden, has_prefix, packing) / lengths[:, None]
        if self.pooling == "cls":
            first = packing.last_rows - (lengths - has_prefix * packing.layout.prefix) + 1
            return hidden.index_select(0, first * ~has_prefix)  # row 0 is the first token of a text with the prefix
        return hidden.index_select(0, packing.last_rows)

    def flops(self, work: EncodingCounts) -> float:
        """FLOPs of a forward pass; with `reads_rows` the last layer counts only one row of each item in full."""
        tokens, config = work.tokens, self.backbone.config
        full = backbone_flops(self.backbone, tokens, work.keys)
        if not self.reads_rows or tokens == 0:
            return full
        layers = config.num_hidden_layers
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        keys_and_values = 2.0 * 2 * config.hidden_size * head * groups
        # The last layer: everything for one row per item, and keys and values for all other rows.
        last_layer = backbone_flops(self.backbone, work.items, work.last_keys) / layers
        last_layer += keys_and_values * (tokens - work.items)
        return full * (layers - 1) / layers + last_layer

    def _sums_of_rows(self, hidden: Tensor, has_prefix: Tensor, packing: TextPacking) -> Tensor:
        """Sum over each item's rows, including the prefix rows if it begins with the prefix: [U, D]."""
        prefix, item_rows = hidden.tensor_split([packing.layout.prefix])
        sums = hidden.new_zeros(has_prefix.numel(), self.width).index_add(0, packing.item_of_row, item_rows)
        return sums + has_prefix[:, None] * prefix.sum(0)

    def _embed(self, token_ids: Tensor, cu_seqlens: Tensor, lengths: Tensor, packing: TextPacking) -> Tensor:
        """Input embeddings [P + R, D]: prefix, then the items' rows; an item's [ITEM], if it has one, is its last row.

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
        """Last hidden states [P + R, D], or only [U, D] of the rows `read` [U], the last row of each text."""
        if self.arrangement != "packed":
            return self._encode_padded(embedded, layout)
        full_plan = plan_text(layout, self.attention.backend, embedded.device)
        plan: TextPlan = full_plan if read is None else LastLayerRows(full_plan, read)
        return self.run_backbone(embedded, plan)

    def _encode_padded(self, embedded: Tensor, layout: TextLayout) -> Tensor:
        """Last hidden states [R, D] by the unpatched model, in batches of texts of similar or equal lengths."""
        plan = plan_buckets(replace(layout, causal=False), embedded.device, padding=self.arrangement == "padded")
        hidden = []
        for bucket, rows in zip(plan.buckets, embedded.split([b.count for b in plan.buckets]), strict=True):
            mask = None if bucket.mask is None else bucket.mask[:, 0, 0].long()
            output = self.backbone(inputs_embeds=padded_rows(rows, bucket), attention_mask=mask)
            states = output.last_hidden_state.flatten(0, 1)
            hidden.append(states if bucket.kept is None else states.index_select(0, bucket.kept))
        return torch.cat(hidden)


def first_position(backbone: "PreTrainedModel") -> int:
    """Position of a text's first token: RoBERTa and its relatives count from padding_idx + 1."""
    padding = getattr(learned_positions(backbone), "padding_idx", None)
    return 0 if padding is None else padding + 1
