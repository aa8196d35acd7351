"""`CreativeLLM`: a causal language model that reads item texts with soft tokens of a user, and scores responses.

    p(r_n | U_n, item_n) = prod_i p(r_ni | prefix, text_n with k soft tokens at position soft_at_n, r_n,<i)

Texts are packed into one sequence without padding. A prefix that all texts share (an instruction) is encoded once. The
vocabulary head is applied only to the rows that predict response tokens, in chunks.

Legend: N creatives, S tokens of their texts, P tokens of the prefix, k soft tokens, R = S + N k rows, C width, V words.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.attention.text import TextLayout
from hllm_torchrec.modules.attention.text_backends import TEXT_BACKENDS, BackendChoice, plan_text
from hllm_torchrec.modules.attention.text_packing import TextPacking
from hllm_torchrec.modules.encoders.backbone import BackboneModule, TextReading, backbone_flops
from hllm_torchrec.modules.encoders.item_llm import first_position
from hllm_torchrec.modules.jagged import lengths_from_offsets
from hllm_torchrec.modules.losses.token_nll import token_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PackedTexts:
    """Concatenated tokens of N texts, with the positions of the soft tokens and of the response in each. All int64.

    token_ids: [S]; cu_seqlens: [N + 1] from 0; soft_at: [N] number of tokens of a text before its soft tokens;
    response_from: [N] number of tokens of a text before its response, >= soft_at; prefix_ids: [P] tokens before each
    text. None of these numbers counts soft tokens or the prefix.
    """

    token_ids: Tensor
    cu_seqlens: Tensor
    soft_at: Tensor
    response_from: Tensor
    prefix_ids: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedTexts":
        """Return a copy with `function` applied to each tensor."""
        return PackedTexts(*(function(getattr(self, field.name)) for field in fields(self)))

    @property
    def response_tokens(self) -> Tensor:
        """[N] number of tokens of each response."""
        return lengths_from_offsets(self.cu_seqlens) - self.response_from

    def responses(self) -> "PackedTexts":
        """Return new texts: each consists of a response and then soft tokens, and its own response is empty."""
        count = self.response_tokens
        offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
        shift = self.cu_seqlens[:-1] + self.response_from - offsets[:-1]
        at = torch.arange(int(count.sum()), device=count.device) + torch.repeat_interleave(shift, count)
        return PackedTexts(self.token_ids[at], offsets, count, count, self.prefix_ids[:0])


class CreativeOutput(NamedTuple):
    """Result of `CreativeLLM.forward`.

    nll: [N] negative log-likelihood of each response in nats; tokens: [N] int64 number of tokens of each response;
    last: [N, C] hidden state of the last row of each text.
    """

    nll: Tensor
    tokens: Tensor
    last: Tensor


class CreativeLLM(BackboneModule, nn.Module):
    """Scores responses to prompts with soft tokens, with any Hugging Face decoder that supports packed texts.

    Args:
        backbone: a bare model (`AutoModel`, no head) built by `build_backbone`.
        head: the vocabulary head [V, C] without bias; None: the word embeddings (a tied head).

    Raises:
        ValueError: the backbone is an encoder, or a decoder whose attention cannot be replaced.
    """

    reads_text: ClassVar[bool] = False
    """False, because gradients flow through the LLM to the soft tokens; see `ItemLLM.reads_text`."""

    def __init__(self, backbone: "PreTrainedModel", head: nn.Linear | None = None) -> None:
        super().__init__()
        reading: TextReading = getattr(backbone, "hllm_reading", TextReading())
        if reading.arrangement != "packed" or not reading.causal:
            raise ArgumentError(
                f"pretrained: {backbone.config.model_type} is no decoder that can be packed (docs/support.md); choose "
                "one, such as Llama or Qwen3"
            )
        self.backbone, self.head = backbone, head
        self.width: int = backbone.config.hidden_size
        self.first_position = first_position(backbone)
        self.attention = BackendChoice(TEXT_BACKENDS["buckets"], "runs everywhere")

    @property
    def head_weight(self) -> Tensor:
        """[V, C] of the vocabulary head."""
        found: Tensor = self.backbone.get_input_embeddings().weight if self.head is None else self.head.weight
        return found

    @property
    def word_scale(self) -> float:
        """RMS of the entries of the word embeddings, after the model's own scaling; 1 on the meta device."""
        words = self.backbone.get_input_embeddings()
        if words.weight.is_meta:
            return 1.0
        return float(words.weight.detach().float().square().mean().sqrt()) * getattr(words, "scalar_embed_scale", 1.0)

    def forward(self, texts: PackedTexts, soft: Tensor) -> CreativeOutput:
        """Score the responses; soft: [N, k, C]. A rank without texts runs one dummy row, to join the collectives."""
        if texts.soft_at.numel() == 0:
            return CreativeOutput(*self._without_texts(soft))
        hidden, packing = self._encode(texts, soft)
        count = texts.response_tokens
        text_of = torch.repeat_interleave(count)
        # The row before a response token predicts it. Soft tokens shift all rows after them by k.
        place = torch.arange(text_of.numel(), device=count.device) - (count.cumsum(0) - count)[text_of]
        place = place + texts.response_from[text_of]
        first_row = packing.last_rows - (lengths_from_offsets(texts.cu_seqlens) + soft.shape[1]) + 1
        rows = first_row[text_of] + place + soft.shape[1] - 1
        targets = texts.token_ids[texts.cu_seqlens[text_of] + place]
        nll = token_nll(hidden.index_select(0, rows), self.head_weight, targets)
        nll = nll.new_zeros(count.numel()).index_add(0, text_of, nll)
        return CreativeOutput(nll, count, hidden.index_select(0, packing.last_rows))

    def _encode(self, texts: PackedTexts, soft: Tensor) -> tuple[Tensor, TextPacking]:
        """Encode texts with their soft tokens; returns the last hidden states [P + R, C] in the order of the
        packing."""
        number, tokens = soft.shape[:2]
        prefix = texts.prefix_ids.numel()
        rows = lengths_from_offsets(texts.cu_seqlens) + tokens
        packing = TextPacking.of(rows, torch.full_like(rows, prefix > 0, dtype=torch.bool), prefix, causal=True)
        text, place = packing.item_of_row, packing.place_of_row
        words = self.embed(torch.cat([texts.prefix_ids, texts.token_ids]))
        behind = place - texts.soft_at[text]  # position relative to the first soft token
        of_word = prefix + texts.cu_seqlens[text] + place - tokens * (behind >= tokens)
        of_soft = words.shape[0] + text * tokens + behind
        source = torch.where((behind >= 0) & (behind < tokens), of_soft, of_word)
        source = torch.cat([torch.arange(prefix, device=source.device), source])
        rows_in = torch.cat([words, soft.to(words.dtype).flatten(0, 1)]).index_select(0, source)
        return self._run(rows_in, packing.layout), packing

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the word embeddings [n, C] of tokens [n], after the model's own scaling."""
        words: Tensor = self.backbone.get_input_embeddings()(token_ids.long())
        return words

    def _run(self, rows: Tensor, layout: TextLayout) -> Tensor:
        return self.run_backbone(rows, plan_text(layout, self.attention.backend, rows.device))

    def _without_texts(self, soft: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return empty losses, numbers of tokens and states ([0], [0], [0, C]) whose graph contains every weight."""
        word = self.embed(soft.new_zeros(1, dtype=torch.int64))
        hidden = self._run(word + soft.sum(), TextLayout([1]))
        none = torch.zeros(1, dtype=torch.int64, device=soft.device)
        return token_nll(hidden, self.head_weight, none)[:0], none[:0], hidden[:0]

    def flops(self, tokens: int, keys: int) -> float:
        """Return the FLOPs of a forward pass over `tokens` rows that attend to `keys` keys in total, without the
        head."""
        return backbone_flops(self.backbone, tokens, keys)
