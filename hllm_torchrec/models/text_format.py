"""Reading and pooling of an item's text by an Item LLM: from the configuration, or else from the LLM's checkpoint.

A sentence-transformers directory describes how its embeddings are computed: `modules.json` has its parts, `1_Pooling`
the pooling, `config_sentence_transformers.json` the prompts. Options of the configuration that are null are taken from
the directory (`normalize` only if `pooling` is null too). An option that contradicts the directory is used; for
`pooling` and `causal` a warning is logged.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.foreign_files import reading_foreign, refuse_pointers
from hllm_torchrec.config.encoders import ItemLLMConfig
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.token_store import read_tokenizer
from hllm_torchrec.models.backbones import backbone_config
from hllm_torchrec.models.model_files import naming_directory
from hllm_torchrec.models.named_backbones import text_sections
from hllm_torchrec.models.small_models import is_causal
from hllm_torchrec.modules.encoders.item_llm import Pooling

MODULES, PROMPTS, TRANSFORMER = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
_REMEDY = "fetch the directory again"
_POOLING: dict[str, Pooling] = {
    "cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean", "last": "last", "lasttoken": "last",
}  # fmt: skip
"""Name in sentence-transformers (`pooling_mode`, or the end of `pooling_mode_...`) -> name in this library."""
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of the prompt for documents, in the order in which sentence-transformers' `encode_document` tries them."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextFormat:
    """Resolved settings for reading an item's text.

    pooling, normalize, causal: see `ItemLLM`; prompt: added before every text; keeps_end: True if special tokens that
    the tokenizer adds after a text are kept (see `hllm_torchrec.data.token_store`).
    """

    pooling: Pooling
    normalize: bool
    causal: bool
    prompt: str
    keeps_end: bool


@dataclass(frozen=True)
class SentenceFormat:
    """Settings of a sentence-transformers directory.

    pooling: None if it is not supported; says: name of the pooling in `file`; include_prompt: the mean includes the
    prompt's tokens; lower_case: texts are lower-cased before tokenization; left_out: folders of layers after the
    pooling, which this library does not run.
    """

    pooling: Pooling | None
    says: str
    normalize: bool
    prompt: str
    include_prompt: bool
    lower_case: bool
    left_out: tuple[str, ...]
    file: Path


def text_format(name: str, section: ItemLLMConfig) -> TextFormat:
    """Resolve the options of a section that reads text; name: name of the section.

    Raises:
        ValueError: a file is damaged.
        ConfigError: the checkpoint's pooling is not supported and the configuration has none, or the checkpoint leaves
            the prompt out of the mean.
    """
    sentences = None if section.pretrained is None else sentence_format(Path(section.pretrained))
    pooling = section.pooling
    if pooling is None and sentences is not None:
        pooling = sentences.pooling
        if pooling is None:
            raise ConfigError(
                f"{name}.pooling: null: {sentences.file} says {sentences.says!r}, which is not one of item, mean, cls, "
                "last; name one of them"
            )
    causal = _reads_causally(section) if section.causal is None else section.causal
    normalize = section.normalize
    if normalize is None:
        normalize = section.pooling is None and sentences is not None and sentences.normalize
    prompt = section.prompt
    if prompt is None:
        prompt = "" if sentences is None else sentences.prompt
    if prompt and sentences is not None and not sentences.include_prompt and pooling == "mean":
        raise ConfigError(
            f"{name}.prompt: {prompt!r}: {sentences.file} leaves the prompt out of the mean, which is not implemented; "
            'write prompt: "", or another pooling'
        )
    from_checkpoint = section.pooling is None and sentences is not None
    keeps_end = pooling in ("cls", "last") or (pooling == "mean" and (from_checkpoint or not causal))
    return TextFormat(pooling or "item", normalize, causal, prompt, keeps_end)


def format_warnings(name: str, section: ItemLLMConfig) -> Iterator[str]:
    """Yield warnings: `causal` or `pooling` contradicts the checkpoint, or steps of the checkpoint are left out."""
    reads_causally = _reads_causally(section)
    if section.causal is not None and section.causal != reads_causally:
        direction = "from left to right" if reads_causally else "in both directions"
        yield (
            f"{name}.causal: {str(section.causal).lower()}, though {section.pretrained or 'the shape'} reads "
            f"{direction}: the configuration is followed; leave the option out to follow the model"
        )
    sentences = None if section.pretrained is None else sentence_format(Path(section.pretrained))
    if sentences is None:
        return
    if section.pooling is not None and section.pooling != sentences.pooling:
        yield (
            f"{name}.pooling: {section.pooling}, though {sentences.file} says {sentences.says}: the configuration is "
            "followed; leave the option out to follow the model"
        )
    if sentences.lower_case and _distinguishes_case(Path(str(section.tokenizer or section.pretrained))):
        yield (
            f"{name}.pretrained: {section.pretrained}: {TRANSFORMER} says that texts are lower-cased first, which is "
            "not done: lower-case the text columns of the source"
        )
    if sentences.left_out:
        yield (
            f"{name}.pretrained: {section.pretrained}: its layers after the pooling ({', '.join(sentences.left_out)}) "
            "are left out: embeddings are the pooled states"
        )


def _distinguishes_case(directory: Path) -> bool:
    """True if the tokenizer does not lower-case texts itself."""
    tokenizer, text = read_tokenizer(directory), "The Title of an ITEM"
    return bool(tokenizer(text)["input_ids"] != tokenizer(text.lower())["input_ids"])


def _reads_causally(section: ItemLLMConfig) -> bool:
    """True if the model of a section has causal attention in transformers."""
    with naming_directory(section.pretrained):
        return is_causal(backbone_config(section.pretrained, section.shape))


def check_saved_format(saved: Mapping[str, Any], config: Config, checkpoint: Path) -> None:
    """Check that texts are read as in the run that wrote a checkpoint. saved: configuration of that run.

    Raises:
        ConfigError: an option was set in that run and is null now, and the value from the model's directory differs.
    """
    problems = []
    for name, section in text_sections(config):
        form, before = text_format(name, section), saved.get(name) or {}
        for option in ("pooling", "normalize", "causal", "prompt"):
            was, now = before.get(option), getattr(form, option)
            if was is not None and getattr(section, option) is None and was != now:
                problems.append(
                    f"{name}.{option}: null, which means {now!r} here: {checkpoint} was trained with {was!r}; write "
                    f"{name}.{option}: {json.dumps(was)}"
                )
    if problems:
        raise ConfigError(problems)


def sentence_format(directory: Path) -> SentenceFormat | None:
    """Read the sentence-transformers settings of a directory; None if it has none. Raises ValueError if damaged."""
    modules = _read(directory / MODULES, list)
    if modules is None and not (directory / "1_Pooling" / "config.json").is_file():
        return None
    with reading_foreign(directory / MODULES, _REMEDY):
        parts = [(str(part["type"]).rpartition(".")[2], str(part["path"])) for part in modules or ()]
    if modules is None:
        parts = [("Transformer", ""), ("Pooling", "1_Pooling")]
    folder = next((path for kind, path in parts if kind == "Pooling"), None)
    if folder is None:
        return None
    if not re.fullmatch(r"[\w-]+", folder):
        raise ValueError(f"{directory / MODULES}: path {folder!r} must be a folder in the same directory; {_REMEDY}")
    file = directory / folder / "config.json"
    facts = _read(file, dict)
    if facts is None:
        raise ValueError(f"{file}: no such file, though {MODULES} names its folder; {_REMEDY}")
    modes = _modes(facts)
    return SentenceFormat(
        pooling=_POOLING.get(modes[0]) if len(modes) == 1 else None,
        says=" + ".join(modes) or "nothing",
        normalize=any(kind == "Normalize" for kind, _ in parts),
        prompt=_document_prompt(directory / PROMPTS),
        include_prompt=facts.get("include_prompt") is not False,
        lower_case=(_read(directory / TRANSFORMER, dict) or {}).get("do_lower_case") is True,
        left_out=tuple(path for kind, path in parts if kind not in ("Transformer", "Pooling", "Normalize")),
        file=file,
    )


def _modes(facts: dict[str, Any]) -> list[str]:
    """Names of the enabled poolings in a `1_Pooling/config.json`; the default of sentence-transformers is the mean."""
    mode = facts.get("pooling_mode")
    if mode is not None:
        return [str(each) for each in (mode if isinstance(mode, list) else [mode])]
    named = {key.removeprefix("pooling_mode_"): on for key, on in facts.items() if key.startswith("pooling_mode_")}
    return [name for name, on in named.items() if on is True] or ([] if "mean_tokens" in named else ["mean_tokens"])


def _document_prompt(path: Path) -> str:
    facts = _read(path, dict) or {}
    prompts = facts.get("prompts") or {}
    names = [*_DOCUMENT_PROMPTS, facts.get("default_prompt_name")]
    with reading_foreign(path, _REMEDY):
        found = next((prompts[name] for name in names if name in prompts), "")
        if not isinstance(found, str):
            raise ValueError("a prompt is not text")
    return found


def _read(path: Path, kind: type) -> Any:
    """Content of a JSON file, which must be of type `kind`; None if there is no such file."""
    if not path.is_file():
        return None
    refuse_pointers([path])
    with reading_foreign(path, _REMEDY):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"not a JSON {'list' if kind is list else 'object'}")
    return cast(Any, found)
