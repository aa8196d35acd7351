"""Export of a trained run to files that can be used without this library.

    item_llm/               the Item LLM: a Hugging Face directory with tokenizer, and item_token.safetensors
    sentence_transformers/  the Item LLM in the format of sentence-transformers: see `weights.sentence_transformers`
    creative_llm/           the Creative LLM, if there is one: a causal language model with tokenizer
    user_llm/               the User LLM, without word embeddings (other user encoders are in parts.safetensors)
    parts.safetensors       all other weights by their names in the model: projections, heads, tables, logit scale
    config.yaml             the run's configuration, with the exported directories as its pretrained models
    README.md               model card: description, training, metrics, usage

The *_llm directories can be used as `item_llm.pretrained`, `user.pretrained` and `creative.pretrained` of another run.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.common.machine import machine_info
from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.config.encoders import ItemLLMConfig
from hllm_torchrec.config.loading import save_config
from hllm_torchrec.config.lora import LoRAConfig
from hllm_torchrec.data.token_store import TOKENIZER_FILES
from hllm_torchrec.embedding.tables import assemble_tensor
from hllm_torchrec.evaluation.run_loader import LoadedRun, load_run
from hllm_torchrec.models.model_files import trained_item_token
from hllm_torchrec.models.named_backbones import NamedBackbone, Section
from hllm_torchrec.models.text_format import TextFormat, text_format
from hllm_torchrec.modules.lora import merged_state
from hllm_torchrec.weights.creative_card import creative_section
from hllm_torchrec.weights.huggingface import save_backbone, save_causal_model, without_word_embeddings
from hllm_torchrec.weights.sentence_transformers import FOLDER, write_sentence_transformers

FOLDERS = {"user": "user_llm", "creative": "creative_llm"}
"""Part of the model -> name of its directory, if it differs from the name of the part."""


def export_huggingface(
    run: Path, which: str, output: Path, device: torch.device, dataset: Path | None = None
) -> str | None:
    """Write the model of a run into `output`, from its checkpoint `which`: "best", "latest" or a directory.

    Uses averaged weights (`optim.ema`) if the run has them. Only for a single process; any number of ranks may have
    saved the checkpoint.

    Returns:
        The reason why the directory for sentence-transformers is missing; None if it exists or there is no Item LLM.

    Raises:
        ValueError: the run or the checkpoint does not exist, or `output` exists already.
    """
    if output.exists():
        raise ValueError(f"{output}: already exists; name another folder, or remove it")
    loaded = load_run(run, which, device, dataset=dataset, use_items=False)
    with loaded.weights, atomic_folder(output) as folder:
        state = full_state_dict(loaded)
        exported: dict[str, Any] = {}
        left_out: str | None = None
        for part in loaded.experiment.hllm.named_backbones():
            if part.module.backbone is not None:
                name = FOLDERS.get(part.name, part.name)
                _export_part(part, state, folder / name)
                exported[part.name] = _pretrained(part.section, str(output / name))
        if (folder / "item_llm").is_dir():
            left_out = _export_sentences(loaded, folder)
        save_file({key: value.contiguous() for key, value in state.items()}, str(folder / "parts.safetensors"))
        config = loaded.experiment.config
        onward = dataclasses.replace(config, output=f"{config.output}-on", start_from=None, **exported)
        save_config(onward, folder / "config.yaml")
        (folder / "README.md").write_text(model_card(run, loaded, left_out), encoding="utf-8")
    return left_out


def _export_sentences(loaded: LoadedRun, folder: Path) -> str | None:
    """Write the directory for sentence-transformers; return None, or the reason if it cannot be written."""
    item_llm = loaded.experiment.hllm.item_llm
    assert item_llm is not None, "the model has an Item LLM's directory"
    token = trained_item_token(str(folder / "item_llm"), item_llm.width)
    assert token is not None, "the directory has its [ITEM] vector"
    try:
        write_sentence_transformers(loaded.experiment, folder / "item_llm", token, folder / FOLDER)
    except ArgumentError as error:
        return str(error)
    return None


def full_state_dict(loaded: LoadedRun) -> dict[str, Tensor]:
    """Return name -> weight, unsharded and on the CPU. Only for a single process."""
    return {name: assemble_tensor(value).detach().cpu() for name, value in loaded.experiment.model.state_dict().items()}


def _export_part(part: NamedBackbone, state: dict[str, Tensor], target: Path) -> None:
    """Write a Hugging Face model into `target`, with its adapters merged; its weights are removed from `state`."""
    module, section, lora = part.module, part.section, part.section.lora
    assert module.backbone is not None
    weights = {key.removeprefix(part.prefix): state.pop(key) for key in sorted(state) if key.startswith(part.prefix)}
    weights = merged_state(weights, lora.alpha / lora.rank if lora.rank else 0.0)
    if isinstance(section, ItemLLMConfig):
        save_backbone(module.backbone.config, weights, target, state.pop(f"{part.name}.item_token"))
        _copy_tokenizer(section, target)
    elif isinstance(section, CreativeConfig):
        save_causal_model(module.backbone.config, weights, state.pop(f"{part.name}.head.weight", None), target)
        _copy_tokenizer(section, target)
    else:
        save_backbone(*without_word_embeddings(module.backbone.config, weights), target)


def _copy_tokenizer(section: ItemLLMConfig | CreativeConfig, target: Path) -> None:
    source = Path(section.tokenizer or section.pretrained or "")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def _pretrained(section: Section, directory: str) -> Section:
    """Return the configuration section of a part for a run that starts from the exported model."""
    onward = dataclasses.replace(section, pretrained=directory, shape=None, layers=None, lora=LoRAConfig())
    if isinstance(onward, CreativeConfig):
        return dataclasses.replace(onward, tokenizer=None)
    if not isinstance(section, ItemLLMConfig) or not isinstance(onward, ItemLLMConfig):
        return onward
    # Set explicitly what the original checkpoint's sentence-transformers files may define, because those files are not
    # exported.
    form = text_format("item_llm", section)
    return dataclasses.replace(
        onward,
        tokenizer=None,
        pooling=form.pooling,
        normalize=form.normalize,
        causal=form.causal,
        prompt=form.prompt,
    )


def model_card(run: Path, loaded: LoadedRun, left_out: str | None = None) -> str:
    """Write the README of an exported model, in Markdown with Hugging Face's header.

    left_out: reason why the directory for sentence-transformers is missing, or None.
    """
    config, experiment = loaded.experiment.config, loaded.experiment
    item, user = config.item_llm, config.user
    form = text_format("item_llm", item) if item.enabled else None
    prompt = "" if form is None else form.prompt
    info = machine_info()
    rows = {
        "dataset": f"{experiment.dataset.name}, fingerprint {experiment.dataset.fingerprint[:16]}",
        "checkpoint": f"{loaded.checkpoint.name} of {run.name}, seed {config.seed}",
        "Item LLM": _origin(item.pretrained, item.lora) if item.enabled else "none",
        "user encoder": f"{user.encoder}, {_origin(user.pretrained, user.lora)}",
        "objective": f"fusion {config.objective.fusion}, lambda {config.objective.generative_weight}",
        "item text": f"{prompt!r} + {', '.join(item.text_keys)}, at most {item.max_text_length} tokens",
        "made with": f"hllm_torchrec {info['hllm_torchrec']}, "
        + ", ".join(f"{name} {info['packages'][name]}" for name in ("torch", "transformers")),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    sentences = _SENTENCES.format(folder=FOLDER) if left_out is None else f"None for this model: {left_out}."
    if not item.enabled:
        sentences = "None: the model has no Item LLM."
    card = _CARD.format(name=run.name, table=table, metrics=_metrics(run), sentences=sentences, plain=_plain(form))
    return card + (creative_section(config.creative, experiment.dataset) if config.creative.enabled else "")


def _origin(pretrained: str | None, lora: LoRAConfig) -> str:
    adapters = f", trained through adapters of rank {lora.rank} and merged" if lora.rank else ""
    return f"{pretrained or 'random weights'}{adapters}"


def _plain(form: TextFormat | None) -> str:
    """Code that computes an item's embedding with plain transformers; for other poolings than "item", a sentence."""
    if form is None:
        return "None: the model has no Item LLM.\n"
    scaled = "Divide it by its length.\n" if form.normalize else ""
    if form.pooling == "item":
        return _PLAIN + scaled
    rows = {"mean": "the mean", "cls": "the first row", "last": "the last row"}[form.pooling]
    return f"The embedding is {rows} of `last_hidden_state` for an item's text. {scaled}".rstrip() + "\n"


def _metrics(run: Path) -> str:
    """Format the metrics of the evaluation job, or state that there are none."""
    path = run / "metrics.json"
    if not path.is_file():
        return "Not evaluated yet (`hllm evaluate`)."
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"- {name}: AUC {figures['auc']:.4f}"
        for name, figures in (found.get("models") or {}).items()
        if isinstance(figures, dict) and figures.get("auc") is not None  # null: rows of one class
    ]
    retrieval = found.get("retrieval") or {}
    lines += [f"- {name}: {value:.4f}" for name, value in retrieval.items() if "@" in name and value is not None]
    return f"On the {found.get('split', 'evaluated')} part:\n\n" + "\n".join(lines)


_SENTENCES = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")
embeddings = model.encode(["title: Red kettle, brand: Aroma"])  # `key: value` pairs, as in the table's "item text"
```
"""

_PLAIN = """```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("item_llm"), AutoModel.from_pretrained("item_llm")
item = load_file("item_llm/item_token.safetensors")["item_token"]     # appended to the word embeddings of the text
words = model.get_input_embeddings()(tokenizer(text, return_tensors="pt")["input_ids"])
embedding = model(inputs_embeds=torch.cat([words, item[None, None]], dim=1)).last_hidden_state[0, -1]
```
"""

_CARD = """---
library_name: transformers
tags: [recommendation, hllm, hllm_torchrec]
---

# {name}

A hybrid recommender after HLLM (arXiv 2409.12740): the Item LLM encodes an item's text as an embedding, and the user
encoder encodes a history of item embeddings as an interest vector.

| | |
|---|---|
{table}

## Measured

{metrics}

## Reading it with sentence-transformers

{sentences}

## Reading it with plain transformers

{plain}
`user_llm`, if there is one, reads vectors through `inputs_embeds`; its vocabulary is one unused word. Projections,
heads and tables are in `parts.safetensors`. The licenses of the base models and of the training data continue to apply.
"""
