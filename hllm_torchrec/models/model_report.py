"""Check of a Hugging Face directory with its real weights, and the report that `hllm check-model` prints.

The check when a model is built uses a small random model (`backbone_check`). Here texts are tokenized by the
directory's tokenizer and encoded with its weights, by the Item LLM all at once and by plain transformers one at a time.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hllm_torchrec.config.encoders import ItemLLMConfig
from hllm_torchrec.data.token_store import read_tokenizer, tokenize
from hllm_torchrec.models.backbone_check import check_user_backbone
from hllm_torchrec.models.backbones import backbone_config, build_backbone
from hllm_torchrec.models.model_files import load_weights
from hllm_torchrec.models.small_models import TOLERANCE
from hllm_torchrec.models.text_format import TextFormat, format_warnings, text_format
from hllm_torchrec.modules.encoders.backbone import learned_positions
from hllm_torchrec.modules.encoders.item_llm import ItemLLM

WORDS = "the quick brown fox reads item 1024: a film of 1995, drama and comedy, by nobody we know; 上海 東京 é ö ß"
"""Source of the check's texts: each is the first words of this string, or of its repetition."""


@dataclass(frozen=True)
class ModelReport:
    """Result of `report_model`; difference: maximum over all texts, relative to the largest value of an embedding."""

    model_type: str
    layers: int
    width: int
    arrangement: str
    form: TextFormat
    texts: int
    difference: float
    warnings: tuple[str, ...]
    user_problem: str | None

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report."""
        form = self.form
        direction = "from left to right" if form.causal else "in both directions"
        yield f"{self.model_type}: {self.layers} layers, {self.width} wide"
        yield f"reads {direction}; texts {self.arrangement.replace('_', ' ')}"
        scaled = ", scaled to length 1" if form.normalize else ""
        yield f"pooling {form.pooling}{scaled}; prompt {form.prompt!r}; special tokens after a text: " + (
            "kept" if form.keeps_end else "kept only by a tokenizer with [CLS]"
        )
        yield (
            f"as Item LLM: {self.texts} texts encoded together and by plain transformers one at a time differ by "
            f"{self.difference:.1e} of the largest value"
        )
        yield f"as User LLM: {self.user_problem or 'can be used'}"
        yield from (f"note: {warning}" for warning in self.warnings)


@torch.no_grad()
def report_model(directory: Path, max_text_length: int = 64) -> ModelReport:
    """Compare the Item LLM with plain transformers on the weights of a directory.

    Raises:
        ValueError: a file is damaged, no arrangement of texts agrees with transformers, or embeddings differ.
    """
    section = ItemLLMConfig(pretrained=str(directory))
    config = backbone_config(str(directory), None)
    form = text_format("item_llm", section)
    texts = [form.prompt + text for text in _texts()]
    tokens = [torch.tensor(ids) for ids in tokenize(read_tokenizer(directory), texts, max_text_length, form.keeps_end)]
    # Load the two models one after the other, because two copies of a large model may not fit into memory.
    plain = load_weights(str(directory), config).eval()
    if (learned := learned_positions(plain)) is not None:  # leave one position for [ITEM]
        unused = getattr(learned, "offset", 0) + (0 if learned.padding_idx is None else learned.padding_idx + 1)
        tokens = [ids[: learned.num_embeddings - unused - 1] for ids in tokens]
    item_token = plain.get_input_embeddings().weight.detach()[:8].mean(0)
    expected = torch.stack([_alone(plain, ids, item_token, form) for ids in tokens])
    del plain
    gc.collect()
    llm = ItemLLM(build_backbone(str(directory)), form.pooling, normalize=form.normalize).eval()
    llm.item_token.data.copy_(item_token)
    offsets = torch.tensor([0, *(len(ids) for ids in tokens)]).cumsum(0)
    found = llm(torch.cat(tokens), offsets)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < TOLERANCE:
        raise ValueError(
            f"{directory}: {config.model_type}: embeddings differ from transformers' by {difference:.1e} of the "
            "largest value, although a random model of its config.json agrees; choose another model"
        )
    return ModelReport(
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        llm.arrangement,
        form,
        len(texts),
        difference,
        tuple(format_warnings("item_llm", section)),
        _user_problem(directory),
    )


def _texts() -> list[str]:
    words = WORDS.split()
    return [" ".join((words * 3)[:number]) for number in (1, 2, 3, 5, 6, 8, 13, 14, 21, 40)]


def _alone(plain: torch.nn.Module, ids: Tensor, item_token: Tensor, form: TextFormat) -> Tensor:
    """Embedding [D] of one text by plain transformers."""
    if form.pooling == "item":
        words = plain.get_input_embeddings()(ids)  # type: ignore[operator]
        return plain(inputs_embeds=torch.cat([words, item_token[None]])[None]).last_hidden_state[0, -1]
    states = plain(input_ids=ids[None]).last_hidden_state[0]
    pooled = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[form.pooling]
    return torch.nn.functional.normalize(pooled, dim=-1) if form.normalize else pooled


def _user_problem(directory: Path) -> str | None:
    try:
        check_user_backbone(backbone_config(str(directory), None))
    except ValueError as error:
        return f"refused: {error}"
    return None
