"""Item LLM: an item's text becomes one embedding E (HLLM, section "Item LLM").

The input is {t_1, ..., t_m, [ITEM]}: the tokens of the text, then one learned vector. E is the last hidden
state at [ITEM], or the mean over the text's tokens (the paper's Table 10). Items are packed one after the
other; `hllm_torchrec.modules.attention` keeps them apart, so padding is never encoded. There is no vocabulary
head.

Legend: U items, S text tokens of all items, P = S plus one [ITEM] per item that has one, D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hllm_torchrec.modules.attention import PACKED_ATTENTION, plan_attention
from hllm_torchrec.modules.jagged import lengths_from_offsets, offsets_from_lengths, sequence_of_position

Pooling = Literal["item", "mean"]


class ItemLLM(nn.Module):
    """Packed token ids -> item embeddings, with any Hugging Face decoder or encoder as backbone.

    Args:
        backbone: a bare model (`AutoModel`, no head) built by `build_backbone`.
        pooling: "item" reads the learned [ITEM] vector's last hidden state; "mean" averages the text's tokens
            (an item without text is [ITEM] alone in both).
        causal: decoders True, encoders such as BERT False.
    """

    def __init__(self, backbone: PreTrainedModel, pooling: Pooling = "item", causal: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.causal = causal
        self.width: int = backbone.config.hidden_size
        words = backbone.get_input_embeddings().weight
        # Start where the words live: a vector of another scale would dominate the first layer's norm.
        self.item_token = nn.Parameter(
            words.detach().float().mean(0) if not words.is_meta else words.new_zeros(self.width)
        )

    def forward(self, token_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """token_ids [S] int, cu_seqlens [U+1] int64 -> E [U, D]."""
        items = cu_seqlens.numel() - 1
        lengths = lengths_from_offsets(cu_seqlens)
        has_token = torch.ones_like(lengths) if self.pooling == "item" else (lengths == 0).to(lengths.dtype)
        packed_offsets = offsets_from_lengths(lengths + has_token)
        total = token_ids.numel() + int(has_token.sum())
        if total == 0:  # a rank without items runs every weight once: DDP's and FSDP's collectives need it
            words = self.backbone.get_input_embeddings()(token_ids.long())
            alone = torch.cat([words, self.item_token[None].to(words.dtype)])
            return self._encode(alone, torch.tensor([0, 1], device=token_ids.device))[:0]
        hidden = self._encode(self._embed(token_ids, cu_seqlens, packed_offsets, has_token, total), packed_offsets)
        if self.pooling == "item":
            return hidden[packed_offsets[1:] - 1]
        sums = hidden.new_zeros(items, self.width)
        sums = sums.index_add(0, sequence_of_position(packed_offsets, total), hidden)
        return sums / lengths_from_offsets(packed_offsets)[:, None]

    def _embed(
        self, token_ids: Tensor, cu_seqlens: Tensor, packed_offsets: Tensor, has_token: Tensor, total: int
    ) -> Tensor:
        """Word vectors with [ITEM] in the last place of every item that has it: [P, D]."""
        words = self.backbone.get_input_embeddings()(token_ids.long())
        shift = packed_offsets[:-1] - cu_seqlens[:-1]
        text_rows = torch.arange(token_ids.numel(), device=token_ids.device)
        text_rows = text_rows + shift[sequence_of_position(cu_seqlens, token_ids.numel())]
        item_rows = (packed_offsets[1:] - 1)[has_token.bool()]
        order = torch.empty(total, dtype=torch.int64, device=token_ids.device)
        order[torch.cat([text_rows, item_rows])] = torch.arange(total, device=token_ids.device)
        return torch.cat([words, self.item_token.to(words.dtype).expand(item_rows.numel(), -1)])[order]

    def _encode(self, embedded: Tensor, packed_offsets: Tensor) -> Tensor:
        plan = plan_attention(packed_offsets, embedded.shape[0], causal=self.causal)
        output = self.backbone(
            inputs_embeds=embedded[None], position_ids=plan.position_ids, use_cache=False, hllm_plan=plan
        )
        return output.last_hidden_state[0]


def build_backbone(
    pretrained: str | None,
    shape: dict | None = None,
    layers: int | None = None,
    *,
    word_embeddings: bool = True,
    attention: str = PACKED_ATTENTION,
) -> PreTrainedModel:
    """A bare Hugging Face model with packed attention.

    Args:
        pretrained: a Hugging Face directory (its weights are loaded), or None for random weights.
        shape: keyword arguments of the config when nothing is pretrained, with "model_type".
        layers: keep the first n layers (None: all).
        word_embeddings: False drops them, as the User LLM does (they would be unused parameters).
        attention: name in transformers' attention registry.

    Raises:
        ValueError: neither or both of `pretrained` and `shape`, or more layers asked for than there are.
    """
    if (pretrained is None) == (shape is None):
        raise ValueError(
            f"pretrained={pretrained!r}, shape={shape!r}: a backbone needs one of them: the directory of its "
            "weights, or a shape for random ones"
        )
    if pretrained is not None:
        config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
        model = _load(pretrained, _adapted(config, layers, attention))
    else:
        config = AutoConfig.for_model(**(shape or {}))
        model = AutoModel.from_config(_adapted(config, layers, attention), trust_remote_code=False)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's pooler serves sentence pairs; unused parameters would stall DDP
    if not word_embeddings:
        model.set_input_embeddings(None)
    return model


def _adapted(config: PreTrainedConfig, layers: int | None, attention: str) -> PreTrainedConfig:
    """The config with the first `layers` only, and `attention`."""
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"layers: {layers}: the backbone has {config.num_hidden_layers}; ask for 1 to that many")
        config.num_hidden_layers = layers
    config._attn_implementation = attention
    return config


def _load(directory: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Weights as fp32 masters, without remote code; a weight that the file lacks is an error."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # layers left out on purpose would fill a page with warnings
    try:
        model, report = AutoModel.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=config._attn_implementation,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.train()  # from_pretrained leaves it in evaluation mode: no dropout, no activation checkpointing
    missing = [key for key in report["missing_keys"] if "pooler" not in key]
    if missing:
        raise ValueError(
            f"{directory}: {len(missing)} weights are missing, e.g. {missing[0]}: not a complete checkpoint"
        )
    return model
