"""`CreativeTokens`: tokens of the prompts and responses of a table of creatives, in memory-mapped arrays.

The template of a prompt is split at its placeholders before texts are inserted. Inserted texts are never interpreted:
braces and special tokens in them are plain text. A tokenized text consists of the prompt's tokens before {user}, those
after {user}, the response and the end token. The tokens with which all texts begin, such as an instruction, are stored
once (`prefix`).

Legend: N creatives.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.hashing import hash_file, hash_json
from hllm_torchrec.config.creative import PLACEHOLDER, USER, CreativeConfig
from hllm_torchrec.data.creative_table import TEXTS, CreativeRows, CreativeTable
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.derived_files import derived_path
from hllm_torchrec.data.jagged_arrays import concat_ranges, offsets_from_lengths
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.data.token_store import TOKENIZER_FILES, read_tokenizer, special_tokens
from hllm_torchrec.modules.creative.creative_llm import PackedTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_FACTS = "tokens.json"
_ARRAYS = ("values", "offsets", "soft_at", "response_from", "rows")
_PROFILES = ("profile_values", "profile_offsets", "profile_of")
"""Arrays of the training part if a loss reads profiles: tokens and offsets of the distinct profiles, and the index of
each creative's profile."""
_AT_ONCE = 4096


@dataclass(frozen=True)
class TextTokens:
    """Tokens of a prompt before and after {user}."""

    before: list[int]
    after: list[int]


class CreativeTokenizer:
    """Inserts texts into the prompt of a configuration, and tokenizes prompts and responses.

    Raises:
        ConfigError: no tokenizer is configured, or the tokenizer has no end token.
    """

    def __init__(self, section: CreativeConfig) -> None:
        directory = section.tokenizer or section.pretrained
        if directory is None:
            raise ConfigError("creative.tokenizer: none: a model from scratch still needs a tokenizer directory")
        self.section, self.directory = section, Path(directory)
        self.tokenizer: PreTrainedTokenizerBase = read_tokenizer(self.directory)
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"creative.tokenizer: {directory}: has no end token (eos_token); choose another one")
        self.end = int(self.tokenizer.eos_token_id)
        self._begin = special_tokens(self.tokenizer)[0]
        self._parts = [PLACEHOLDER.split(half) for half in section.prompt.split(USER)]

    def prompts(self, texts: Mapping[str, Sequence[str]], number: int) -> list[TextTokens]:
        """Tokenize `number` prompts; texts: column -> text of each prompt."""
        halves = []
        for parts in self._parts:
            filled = [
                # Every second part is the name of a column, whose text is inserted unchanged.
                "".join(part if i % 2 == 0 else texts[part][row] or "" for i, part in enumerate(parts))
                for row in range(number)
            ]
            halves.append(self._ids(filled))
        return [TextTokens(self._begin + before, after) for before, after in zip(*halves, strict=True)]

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize responses and append the end token; a response cut to `max_response_length` has no end token."""
        most = self.section.max_response_length
        # A space separates the response from the prompt, unless the prompt ends with a space, a newline or {user}.
        lead = "" if self.section.prompt.endswith((" ", "\n", USER)) else " "
        found = [[*ids, self.end] for ids in self._ids([lead + " ".join(text.split()) for text in texts])]
        return [ids[:most] for ids in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a response's tokens, on one line."""
        text: str = self.tokenizer.decode([one for one in ids if one != self.end], skip_special_tokens=True)
        return " ".join(text.split())

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # split_special_tokens: the name of a special token in a title is tokenized as plain text.
        found: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        return found


class CreativeTokens:
    """Tokens of one part of a table, read from a folder of `build_creative_tokens`; see the module docstring."""

    def __init__(self, folder: Path, split: str) -> None:
        self.facts: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        self.prefix = torch.tensor(self.facts["prefix"], dtype=torch.int64)
        arrays = {name: np.load(folder / f"{split}-{name}.npy", mmap_mode="r") for name in _ARRAYS}
        self.values, self.offsets, self.soft_at, self.response_from, self.rows = arrays.values()
        self._profiles = [np.load(path, mmap_mode="r") for path in _profile_files(folder, split) if path.is_file()]

    def __len__(self) -> int:
        return self.rows.size

    @property
    def lengths(self) -> Ints:
        """[N] number of tokens of each text, without the prefix."""
        return np.diff(self.offsets)

    def gather(self, index: Ints) -> PackedTexts:
        """Pack the texts at `index` [n]."""
        starts, lengths = self.offsets[index], self.lengths[index]
        return PackedTexts(
            token_ids=torch.from_numpy(self.values[concat_ranges(starts, lengths)].astype(np.int64)),
            cu_seqlens=torch.from_numpy(offsets_from_lengths(lengths)),
            soft_at=torch.from_numpy(self.soft_at[index].astype(np.int64)),
            response_from=torch.from_numpy(self.response_from[index].astype(np.int64)),
            prefix_ids=self.prefix,
        )

    def gather_profiles(self, index: Ints) -> PackedTexts | None:
        """Pack the profile of each creative at `index` [n] as response to the profile prompt.

        None: no loss reads profiles, or this is not the training part.
        """
        if not self._profiles:
            return None
        values, offsets, of = self._profiles
        prompt, chosen = TextTokens(*self.facts["profile_prompt"]), of[index]
        starts, lengths = offsets[chosen], offsets[chosen + 1] - offsets[chosen]
        profiles = np.split(values[concat_ranges(starts, lengths)], np.cumsum(lengths)[:-1]) if index.size else []
        return pack_texts([prompt] * index.size, [ids.tolist() for ids in profiles], torch.tensor(prompt.before))


def _profile_files(folder: Path, split: str) -> list[Path]:
    return [folder / f"{split}-{name}.npy" for name in _PROFILES]


def pack_texts(prompts: Sequence[TextTokens], responses: Sequence[Sequence[int]], prefix: torch.Tensor) -> PackedTexts:
    """Pack prompts, which all begin with `prefix`, each with its response."""
    first = prefix.numel()
    texts = [[*p.before[first:], *p.after, *r] for p, r in zip(prompts, responses, strict=True)]
    flat = [token for text in texts for token in text]
    return PackedTexts(
        token_ids=torch.tensor(flat, dtype=torch.int64),
        cu_seqlens=torch.from_numpy(offsets_from_lengths([len(text) for text in texts])),
        soft_at=torch.tensor([len(p.before) - first for p in prompts], dtype=torch.int64),
        response_from=torch.tensor([len(p.before) - first + len(p.after) for p in prompts], dtype=torch.int64),
        prefix_ids=prefix,
    )


def build_creative_tokens(dataset: Dataset, table: CreativeTable, section: CreativeConfig) -> Path:
    """Return the folder of a table's tokens for a configuration; builds the tokens if they do not exist.

    Raises:
        ConfigError: the prompt names an unknown column, a prompt is too long (with `creative.over_long: error`), or a
            training row has no profile although a loss reads profiles.
        ValueError: the table is damaged.
    """
    tokenizer = CreativeTokenizer(section)
    files = [path for name in TOKENIZER_FILES if (path := tokenizer.directory / name).is_file()]
    request = {
        "format": _FORMAT,
        "table": table.fingerprint,
        "items": dataset.items_fingerprint,
        "tokenizer": {path.name: hash_file(path) for path in files},
        "prompt": section.prompt,
        "lengths": [section.max_prompt_length, section.max_response_length, section.over_long],
    }
    if section.losses.read_profiles:
        request["profile"] = [section.profile.prompt, section.profile.max_length]
    path = derived_path(dataset, "tokens", f"creatives-{hash_json(request)[:16]}")
    if (path / _FACTS).is_file():
        return path
    _check_columns(dataset, section)
    with atomic_folder(path, marker=_FACTS) as folder:
        parts = {split: table.part(split) for split in SPLITS}
        prompts = {split: list(_prompts(tokenizer, dataset, part)) for split, part in parts.items()}
        prefix = _common_prefix([one.before for of_part in prompts.values() for one in of_part])
        facts: dict[str, Any] = {"request": request, "prefix": prefix, "dropped": {}, "cut": {}}
        largest = max([*prefix, tokenizer.end])
        for split, part in parts.items():
            arrays, cut = _tokenize_part(tokenizer, part, prompts[split], len(prefix), f"{table.path.name}, {split}")
            facts["dropped"][split], facts["cut"][split] = len(part) - arrays["rows"].size, cut
            largest = max(largest, int(arrays["values"].max(initial=0)))
            for name, array in arrays.items():
                np.save(folder / f"{split}-{name}.npy", array)
            if split == "train" and section.losses.read_profiles:
                facts["profile_prompt"], profiles = _tokenize_profiles(section, parts[split], arrays["rows"], table)
                largest = max(largest, int(profiles[0].max(initial=0)))
                for file, array in zip(_profile_files(folder, split), profiles, strict=True):
                    np.save(file, array)
        facts["vocab_size"] = largest + 1
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return path


def _tokenize_profiles(
    section: CreativeConfig, part: CreativeRows, rows: Ints, table: CreativeTable
) -> tuple[tuple[list[int], list[int]], list[Ints]]:
    """Return the tokens of the profile prompt before and after {user}, and the arrays of `_PROFILES`.

    rows: [N] row of the part of each creative.
    """
    column = part.rows["profile"].take(pa.array(rows)).combine_chunks().dictionary_encode()
    missing = column.null_count + sum(not text.strip() for text in column.drop_null().to_pylist())
    if missing:
        raise ConfigError(
            f"creative.losses: recon and align read profiles, and {missing} training rows of {table.path} have none: "
            "write recon: 0 and align: 0, or give the table a column profile"
        )
    tokenizer = CreativeTokenizer(
        replace(section, prompt=section.profile.prompt, max_response_length=section.profile.max_length)
    )
    [prompt] = tokenizer.prompts({}, 1)
    profiles = tokenizer.responses(column.dictionary.to_pylist())
    values = np.fromiter((token for ids in profiles for token in ids), np.int32)
    offsets = offsets_from_lengths([len(ids) for ids in profiles])
    return (prompt.before, prompt.after), [values, offsets, column.indices.to_numpy().astype(np.int64)]


def _check_columns(dataset: Dataset, section: CreativeConfig) -> None:
    known = [*dataset.manifest["text_columns"], *TEXTS]
    unknown = [name for name in section.columns if name not in known]
    if unknown:
        raise ConfigError(
            f"creative.prompt: {{{unknown[0]}}}: no text column of {dataset.root} or of creatives; there are "
            f"{', '.join(known)}"
        )


def item_columns(dataset: Dataset, section: CreativeConfig) -> dict[str, list[str]]:
    """Return the text columns of the dataset that the prompt names: column -> text by item id (0: unknown item)."""
    names = [name for name in section.columns if name in dataset.manifest["text_columns"]]
    table = dataset.text(names) if names else pa.table({})
    return {name: ["", *table[name].to_pylist()] for name in names}


def _prompts(tokenizer: CreativeTokenizer, dataset: Dataset, part: CreativeRows) -> Iterator[TextTokens]:
    columns, section = item_columns(dataset, tokenizer.section), tokenizer.section
    for first in range(0, len(part), _AT_ONCE):
        items = part.item_ids[first : first + _AT_ONCE]
        texts = {name: [values[item] for item in items] for name, values in columns.items()}
        for name in section.columns:
            if name in TEXTS:
                own = part.rows[name].slice(first, _AT_ONCE).to_pylist()
                texts[name] = [a or b for a, b in zip(own, texts.get(name, [""] * len(own)), strict=True)]
        yield from tokenizer.prompts(texts, items.size)


def _common_prefix(texts: Sequence[list[int]]) -> list[int]:
    """Return the longest list of tokens with which all texts begin."""
    if not texts:
        return []
    low, high = min(texts), max(texts)  # in lexicographic order: a prefix of both is a prefix of all texts
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return list(low[:length])


def _tokenize_part(
    tokenizer: CreativeTokenizer, part: CreativeRows, prompts: Sequence[TextTokens], prefix: int, where: str
) -> tuple[dict[str, Ints], int]:
    """Return the arrays of a part (`rows`: rows of the part), and the number of truncated responses."""
    section = tokenizer.section
    lengths = np.array([len(one.before) + len(one.after) for one in prompts], np.int64)
    long = np.flatnonzero(lengths > section.max_prompt_length)
    if long.size and section.over_long == "error":
        raise ConfigError(
            f"creative.max_prompt_length: {section.max_prompt_length}: {long.size} prompts of {where} are longer, the "
            f"longest of {lengths.max()} tokens; raise it, or write over_long: drop"
        )
    kept = np.flatnonzero(lengths <= section.max_prompt_length)
    rows: list[int] = kept.tolist()
    responses = tokenizer.responses(part.rows["response"].take(pa.array(kept)).to_pylist())
    before = [prompts[row].before[prefix:] for row in rows]
    texts = [[*b, *prompts[row].after, *r] for b, row, r in zip(before, rows, responses, strict=True)]
    soft_at = np.array([len(b) for b in before], np.int64)
    arrays: dict[str, Any] = {
        "values": np.fromiter((token for text in texts for token in text), np.int32),
        "offsets": offsets_from_lengths([len(text) for text in texts]),
        "soft_at": soft_at,
        "response_from": soft_at + np.array([len(prompts[row].after) for row in rows], np.int64),
        "rows": kept.astype(np.int64),
    }
    return arrays, sum(ids[-1] != tokenizer.end for ids in responses)
