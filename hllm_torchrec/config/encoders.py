"""Sections of the configuration: `item_llm`, the encoder of item texts, and `user`, the encoder of histories."""

from dataclasses import dataclass, field
from typing import Any, Literal

from hllm_torchrec.config.lora import LoRAConfig


@dataclass(frozen=True)
class ItemLLMConfig:
    """Item LLM: text to item embedding."""

    enabled: bool = True
    """False: no text; items are represented by their IDs (an ID-only sequence model)."""
    pretrained: str | None = None
    """Hugging Face directory with weights and tokenizer."""
    tokenizer: str | None = None
    """Directory of the tokenizer; null: that of `pretrained`."""
    shape: dict[str, Any] | None = None
    """Hugging Face config of a model with random weights, instead of `pretrained`."""
    layers: int | None = None
    """Number of layers to keep, from the first on; null: all."""
    pooling: Literal["item", "mean", "cls", "last"] | None = None
    """Item embedding: the output at the learned [ITEM] vector, the mean of the outputs at the text's tokens (the
    paper's Table 10), or the output at the first or last token. null: as defined by the checkpoint's
    sentence-transformers files, else item."""
    normalize: bool | None = None
    """Scale embeddings to an L2 norm of 1. null: as defined by the checkpoint if its pooling is used, else false."""
    causal: bool | None = None
    """True: a token attends to the text before it, as in decoders; False: to the complete text, as in BERT. null: as
    transformers runs the model."""
    trainable: bool = True
    """False freezes the Item LLM in every stage (the paper's Table 4)."""
    store: str | None = None
    """Embedding store of `hllm embed` for stages with `item_embeddings: stored`; its vectors must be of this Item LLM.
    """
    adapter: int = 0
    """Above 0: width of a trained residual bottleneck applied to stored embeddings; initialized to the identity."""
    standardise: bool = False
    """Center and scale each dimension of the item embedding E before its projection to the user encoder's width, with
    mean and standard deviation of up to 1,024 items, measured before the first step. Embeddings in stores, and a loss
    in the item space `text`, are not standardized."""
    whiten: bool = False
    """Like `standardise`, but with the covariance of up to 16,384 items: the dimensions of E then have nearly equal
    variance and little correlation. For frozen sentence encoders, whose embeddings vary in few directions."""
    freeze_words: bool = False
    """Freeze the word embeddings, which are the largest part of a small LLM's weights and optimizer state."""
    prompt: str | None = None
    """Prefix of every item's text. null: the checkpoint's prompt for documents, if it has one."""
    text_keys: tuple[str, ...] = ("title",)
    """Text columns, flattened to `key: value` in this order."""
    separator: str = ", "
    """Separator of the key-value pairs."""
    max_text_length: int = 256
    """Maximum number of tokens of an item's text, including the prompt."""
    trained_share: float = 1.0
    """Share of a micro-batch's items that receive gradients; the embeddings of the others come from a cache."""
    refresh_after: int = 20
    """Maximum age of a cached embedding, in training micro-batches, after which it is recomputed. Only used if
    trained_share is below 1."""
    items_at_once: int = 0
    """Above 0: a rank stores the activations of at most this many items at a time, and recomputes them group by group
    in the backward pass, which takes a third more compute. Needed with thousands of negatives."""
    share_prefix: bool = True
    """Encode the common first tokens of most texts (the prompt) once instead of in each text, and let the items attend
    to them: gives the same values and gradients with less computation. Only for causal models with packed texts and
    another pooling than last; has no effect on other models."""
    attention: Literal["auto", "buckets", "varlen", "flash", "flex"] = "auto"
    """Kernel for packed texts. auto selects the first that can run of varlen (torch's kernel) and flash (the flash-attn
    package), both on CUDA with `parallel.precision: bf16`, and buckets: SDPA in padded length-sorted buckets, on any
    device. flex: torch's FlexAttention (CUDA), only if set explicitly."""
    quantization: Literal["none", "int8"] = "none"
    """int8: the linear layers of a frozen Item LLM multiply int8 numbers (dynamic quantization, only on a CPU); its
    other layers compute in float32. The difference of the embeddings is printed. A store that was made with another
    quantization is refused."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters trained instead of the Item LLM's base weights; the [ITEM] vector is trained as well."""

    @property
    def has_backbone(self) -> bool:
        """True for a Hugging Face model."""
        return self.enabled


@dataclass(frozen=True)
class UserEncoderConfig:
    """User encoder: the User LLM or another sequence model."""

    encoder: str = "llm"
    """llm: a Hugging Face decoder; hstu, sasrec and ligr are configured by `shape`, see
    `hllm_torchrec.modules.encoders.shapes`; module:Name: a custom `UserEncoder`
    (docs/tutorials/add_a_user_encoder.md)."""
    pretrained: str | None = None
    """Hugging Face directory of a decoder; its word embeddings are dropped."""
    shape: dict[str, Any] | None = None
    """Hugging Face config of a decoder with random weights, instead of `pretrained`; for the other encoders the
    fields of HSTUShape, SASRecShape or LiGRShape, or of the custom encoder's `Shape`."""
    layers: int | None = None
    """Number of layers of the decoder to keep, from the first on; null: all."""
    trainable: bool = True
    """False freezes the user encoder (the paper's Table 4)."""
    dropout: float = 0.0
    """Dropout probability of the inputs."""
    actions: Literal["summed", "interleaved"] = "summed"
    """Representation of actions in the history (features.action). summed: the action embedding is added to the event;
    interleaved: an event is two tokens, its item and then its action (HSTU's sequence), so sequences are twice as
    long. Windows, prefixes and position tables then count tokens."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters trained instead of the User LLM's base weights (encoder llm only)."""

    @property
    def has_backbone(self) -> bool:
        """True for a Hugging Face model."""
        return self.encoder == "llm"
