"""Export of an Item LLM as a folder that sentence-transformers can load. (vLLM reads such folders too; not tested.)

    modules.json                      Transformer, Pooling and, if embeddings are normalized, Normalize
    1_Pooling/config.json             mean, cls or lasttoken
    sentence_bert_config.json         maximum length in tokens
    config_sentence_transformers.json the prompt, applied to every text
    config.json, model.safetensors, tokenizer files

With pooling "item" the learned [ITEM] vector becomes the word embedding of a new token, which the tokenizer appends to
every text, and the pooling reads the last token. After writing, the folder is loaded with transformers, and the tokens
and embeddings of a few items are compared with those of the run. If they differ, the folder is removed: for example if
the tokenizer's template cannot be changed, or if this library runs the model in another way than transformers.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.config.encoders import ItemLLMConfig
from hllm_torchrec.data.token_store import TokenStore, item_texts, read_tokenizer, special_tokens
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.text_format import TextFormat, text_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = "sentence_transformers"
ITEM_TOKEN = "[ITEM]"
COMPARED = 8
"""Number of items whose tokens and embeddings are compared with those of the run."""
_MODES = {"item": "lasttoken", "last": "lasttoken", "mean": "mean", "cls": "cls"}
_PACKAGE = "sentence_transformers"


def write_sentence_transformers(experiment: Experiment, item_llm: Path, item_token: Tensor, target: Path) -> None:
    """Write the Item LLM of a run into the new folder `target`, in the format of sentence-transformers.

    item_llm: Hugging Face directory of the exported Item LLM; item_token: the [ITEM] vector [D].

    Raises:
        ArgumentError: the tokenizer cannot be changed as needed, or the folder would give other tokens or embeddings
            than the run; `target` is removed.
    """
    section, form = experiment.config.item_llm, text_format("item_llm", experiment.config.item_llm)
    shutil.copytree(item_llm, target, ignore=shutil.ignore_patterns("item_token.safetensors"))
    try:
        tokenizer, model = _read(target)
        longest = section.max_text_length
        if form.pooling == "item":
            _append_item_token(tokenizer, model, item_token)
            longest += 1
        elif not form.keeps_end:
            _close_texts(tokenizer, [])
        tokenizer.model_max_length, tokenizer.padding_side = longest, "right"
        if tokenizer.pad_token is None:  # any token will do, because the attention mask excludes padding
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.save_pretrained(str(target))
        model.save_pretrained(str(target))
        _write_modules(target, form, model.config.hidden_size, longest)
        _compare(experiment, section, form, target)
    except ArgumentError:
        shutil.rmtree(target)
        raise


def _read(directory: Path) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    from transformers import AutoModel

    return read_tokenizer(directory), AutoModel.from_pretrained(
        str(directory), trust_remote_code=False, use_safetensors=True
    ).eval()


def _append_item_token(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", item_token: Tensor) -> None:
    """Add [ITEM] to the word embeddings, and make the tokenizer append it to every text."""
    if ITEM_TOKEN in tokenizer.get_vocab():
        raise ArgumentError(f"the tokenizer already has a token {ITEM_TOKEN}")
    tokenizer.add_special_tokens({"additional_special_tokens": [ITEM_TOKEN]})
    row = tokenizer.convert_tokens_to_ids(ITEM_TOKEN)
    words = model.get_input_embeddings()
    if row >= words.num_embeddings:
        model.resize_token_embeddings(row + 1, mean_resizing=False)
        words = model.get_input_embeddings()
    # Some models (Gemma) scale word embeddings after the lookup. The run adds the [ITEM] vector after this scaling, so
    # it is divided by the scale.
    with torch.no_grad():
        words.weight[row] = item_token / getattr(words, "scalar_embed_scale", 1.0)
    _close_texts(tokenizer, [ITEM_TOKEN])


def _close_texts(tokenizer: "PreTrainedTokenizerBase", after: Sequence[str]) -> None:
    """Make the tokenizer append the tokens `after` to every text, instead of its own end tokens."""
    from tokenizers.processors import TemplateProcessing

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArgumentError("the tokenizer is not a fast one (tokenizer.json), whose template could be changed")
    before = list(tokenizer.convert_ids_to_tokens(special_tokens(tokenizer)[0]))
    single = " ".join([*(f"{token}:0" for token in before), "$A:0", *(f"{token}:0" for token in after)])
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys([*before, *after])]
    backend.post_processor = TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=special)


def _write_modules(target: Path, form: TextFormat, width: int, longest: int) -> None:
    """Write the configuration files of sentence-transformers: modules, pooling, maximum length and prompt."""
    mode = _MODES[form.pooling]
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] * form.normalize)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{_PACKAGE}.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    pooling = {f"pooling_mode_{name}": name == {"cls": "cls_token", "mean": "mean_tokens"}.get(mode, mode)
               for name in ("cls_token", "mean_tokens", "lasttoken")}  # fmt: skip
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **pooling, "include_prompt": True},
        "sentence_bert_config.json": {"max_seq_length": longest, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"document": form.prompt} if form.prompt else {},
            "default_prompt_name": "document" if form.prompt else None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _compare(experiment: Experiment, section: ItemLLMConfig, form: TextFormat, target: Path) -> None:
    """Raise ArgumentError if the exported folder gives other tokens or embeddings of a few items than the run."""
    assert experiment.item_encoder is not None
    tokenizer, model = _read(target)
    texts = next(item_texts(experiment.dataset, form.prompt, section.text_keys, section.separator))[:COMPARED]
    store, items = experiment.item_encoder.tokens, np.arange(1, len(texts) + 1)
    ids = [tokenizer(text, truncation=True, max_length=tokenizer.model_max_length)["input_ids"] for text in texts]
    _compare_tokens(store, items, ids, tokenizer.convert_tokens_to_ids(ITEM_TOKEN) if form.pooling == "item" else None)
    ours = _embeddings_of_run(experiment, items)
    theirs = torch.stack([_pooled(model, row, form) for row in ids if row])
    has_tokens = torch.tensor([bool(row) for row in ids])
    error = (ours[has_tokens] - theirs).norm(dim=1) / ours[has_tokens].norm(dim=1)
    if error.max() > 1e-4:
        raise ArgumentError(
            f"transformers computes other embeddings than the run: they differ by {error.max():.1%} of their length"
        )


def _compare_tokens(store: TokenStore, items: np.ndarray, ids: list[list[int]], last: int | None) -> None:
    values, offsets = store.gather(items)
    for number, row in enumerate(ids):
        of_run = [*values[offsets[number] : offsets[number + 1]].tolist(), *([] if last is None else [last])]
        if row != of_run:
            raise ArgumentError(f"the exported tokenizer gives other tokens for the text of item {items[number]}")


@torch.no_grad()
def _embeddings_of_run(experiment: Experiment, items: np.ndarray) -> Tensor:
    assert experiment.item_encoder is not None and experiment.live_items is not None
    experiment.hllm.eval()
    ids = torch.from_numpy(items).to(experiment.device)
    return experiment.item_encoder.encode(experiment.live_items.item_llm, ids).float().cpu()


@torch.no_grad()
def _pooled(model: "PreTrainedModel", ids: list[int], form: TextFormat) -> Tensor:
    hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    pooled = {"mean": hidden.mean(0), "cls": hidden[0]}.get(form.pooling, hidden[-1])
    return torch.nn.functional.normalize(pooled, dim=-1) if form.normalize else pooled
