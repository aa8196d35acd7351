"""Token ids of every item, computed once and memory-mapped.

The text of an item is prompt + `key: value` for each key with a value, joined by a separator. The text of item 0, the
unknown item, and of items without text is the prompt. If the prompt is empty, this can be zero tokens, and the item is
encoded from the [ITEM] vector only.

Special tokens: tokens that the tokenizer adds before a text (BOS, [CLS]) are kept. Tokens that it adds after a text
([SEP]) are kept if there is a [CLS], that is for encoders, or with `keep_end`, which is set for embeddings pooled from
the text. Otherwise they are left out, because decoder texts are followed by the [ITEM] vector. The maximum length
includes the special tokens. Long texts are cut at the end, or at the start if `truncation_side` of the tokenizer is
left.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.common.foreign_files import reading_foreign, refuse_pointers
from hllm_torchrec.common.hashing import hash_file, hash_texts
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.derived_files import derived_path
from hllm_torchrec.data.jagged_arrays import concat_ranges, offsets_from_lengths
from hllm_torchrec.data.validation import error_location

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files of a Hugging Face directory that make up its tokenizer."""
_FORMAT = "1"
_DIGESTS = "digests.arrow"
"""File with a digest of each item's text; a later store reuses the tokens of items with equal digests."""
_REMEDY = "delete the folder and build it again"
_BATCH = 4_096
_MOST_GROWTH = 1_000
"""Maximum factor by which a tokenizer's normalizer may lengthen a text; real ones replace single characters."""


class TokenStore:
    """Memory-mapped token ids of the items 0 .. n-1; `open` reads none of them."""

    def __init__(self, path: Path, values: np.ndarray, offsets: np.ndarray, facts: dict[str, Any]) -> None:
        self.path = path
        self.values = values
        """int32 [total], the concatenated token ids of all items."""
        self.offsets = offsets
        """int64 [n + 1]; item i has values[offsets[i] : offsets[i + 1]]."""
        self.facts = facts
        """Inputs that determine the store, its sizes, and `vocab_size`: the largest token id + 1."""

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Map the store in the folder `path`. Raises ValueError if it does not exist or is damaged."""
        root = Path(path)
        if not (root / "store.json").is_file():
            raise ValueError(f"{root} is not a token store (no store.json); make one with build_token_store")
        facts = _read_facts(root / "store.json")
        values, offsets = _read_array(root / "values.arrow", np.int32), _read_array(root / "offsets.arrow", np.int64)
        # Check only lengths and offsets, as a check of the token ids would read the complete file. `_gather` checks the
        # ids that it returns.
        wrong = len(offsets) != facts["items"] + 1 or len(values) != facts["tokens"]
        if wrong or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError(f"{root} is damaged: its files and store.json differ; {_REMEDY}")
        return cls(root, values, offsets, facts)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each item, int64 [n]."""
        return np.diff(self.offsets)

    def gather(self, item_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The packed tokens of `item_ids` (int [k]; repetitions allowed), in the order of `item_ids`.

        Returns (token_ids int32 [sum of lengths], cu_seqlens int64 [k + 1], starting at 0).
        Raises ValueError for an id outside 0 .. n-1.
        """
        ids = self._checked(item_ids)
        return self._gather(self.offsets[ids], self.offsets[ids + 1])

    def gather_behind_prefix(self, item_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Like `gather`, but items that begin with `prefix` are returned without it.

        Returns (token_ids, cu_seqlens, has_prefix), has_prefix bool [k]: True for items that begin with `prefix`.
        Raises like `gather`.
        """
        ids = self._checked(item_ids)
        has_prefix = self.begins_with_prefix[ids]
        return *self._gather(self.offsets[ids] + has_prefix * len(self.prefix), self.offsets[ids + 1]), has_prefix

    @property
    def prefix(self) -> np.ndarray:
        """Tokens int32 [P] with which many items begin (usually the prompt and the first key's name); P may be 0.

        Grown greedily: each step appends the most frequent next token (ties: smallest id) among the items that share
        the prefix so far. Of these prefixes, the one that saves the most tokens, P x (number of items), is chosen
        (ties: shortest). Computed once, from the first tokens of the items.
        """
        return self._prefix_and_items[0]

    @property
    def begins_with_prefix(self) -> np.ndarray:
        """Mask (bool [n]) of the items that begin with `prefix` (all, if it is empty)."""
        return self._prefix_and_items[1]

    @cached_property
    def _prefix_and_items(self) -> tuple[np.ndarray, np.ndarray]:
        lengths, items = self.lengths, np.arange(len(self))
        grown: list[int] = []
        best: tuple[int, np.ndarray] = (0, items)
        while True:
            # Items that end here cannot share a longer prefix. A prefix of a single item saves nothing.
            items = items[lengths[items] > len(grown)]
            if len(items) < 2:
                break
            tokens = self.values[self.offsets[items] + len(grown)]
            grown.append(int(np.bincount(tokens).argmax()))
            items = items[tokens == grown[-1]]
            # Compare the tokens saved by this prefix with those of the best one; ">" keeps the shorter one at ties.
            if len(items) > 1 and len(grown) * len(items) > best[0] * len(best[1]):
                best = len(grown), items
        begins = np.zeros(len(self), bool)
        begins[best[1]] = True
        return np.array(grown[: best[0]], np.int32), begins

    def _gather(self, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = ends - starts
        token_ids = self.values[concat_ranges(starts, lengths)]
        limit = self.facts.get("vocab_size", 2**31)
        if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < limit:
            wrong = token_ids[(token_ids < 0) | (token_ids >= limit)][0]
            location = f"{self.path / 'values.arrow'}: token {wrong}"
            raise ValueError(f"{location} is outside 0..{limit - 1}: it is damaged; {_REMEDY}")
        return token_ids, offsets_from_lengths(lengths)

    def _checked(self, item_ids: np.ndarray) -> np.ndarray:
        try:
            ids = np.asarray(item_ids, np.int64)
        except OverflowError as error:
            raise ValueError(f"an item id is beyond int64 ({error}); {self.path} has 0..{len(self) - 1}") from error
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            wrong = ids[(ids < 0) | (ids >= len(self))][0]
            raise ValueError(
                f"item id {wrong} is outside 0..{len(self) - 1} of the token store {self.path}; build it for "
                "this dataset"
            )
        return ids


def build_token_store(
    dataset: Dataset,
    tokenizer_dir: str | Path,
    *,
    prompt: str = "",
    keys: Sequence[str],
    max_text_length: int,
    separator: str = ", ",
    keep_end: bool = False,
) -> Path:
    """The folder of the token store of `dataset` for a tokenizer and a text layout; builds it if it does not exist.

    `keys` are text columns of the dataset; the text is cut to `max_text_length` tokens; keep_end: see the module
    docstring. Safe to call from several processes at once. Raises ValueError for an unknown key, a length below 1 or a
    folder without a tokenizer or with a damaged one.
    """
    if max_text_length < 1:
        raise ValueError(f"max_text_length={max_text_length} must be at least 1")
    root = Path(tokenizer_dir)
    files = [root / name for name in TOKENIZER_FILES if (root / name).is_file()]
    if not files:
        raise ValueError(f"{root} has no tokenizer (no tokenizer.json or similar); give a Hugging Face directory")
    refuse_pointers(files)
    dataset.text(keys)  # raises for an unknown key before anything is written
    # All inputs that the tokens depend on; their hash is the folder's name, so stores with other settings can coexist.
    request = {
        "format": _FORMAT,
        "tokenizer": hash_texts(f"{path.name} {hash_file(path)}" for path in files),
        "prompt": prompt,
        "keys": list(keys),
        "separator": separator,
        "max_text_length": max_text_length,
        "items_sha256": dataset.items_fingerprint,
        **({"keep_end": True} if keep_end else {}),
        **({"truncation_side": "left"} if _is_cut_at_start(root) else {}),
    }
    path = derived_path(dataset, "tokens", hash_texts([json.dumps(request, sort_keys=True)])[:16])
    if (path / "store.json").is_file():
        facts = _read_facts(path / "store.json")
        if any(facts.get(name) != value for name, value in request.items()):
            raise ValueError(f"{path}: its store.json is of other items or settings than its name; {_REMEDY}")
        return path
    tokenizer = read_tokenizer(root)
    with atomic_folder(path, marker="store.json") as folder:
        _write_store(folder, dataset, tokenizer, request, _earlier_store(path.parent, request))
    return path


def _earlier_store(parent: Path, request: dict[str, Any]) -> tuple["TokenStore", np.ndarray] | None:
    """(largest store with the same settings for other texts, its text digests (uint64 [n])); None if there is none."""
    found = None
    for folder in parent.iterdir() if parent.is_dir() else ():
        try:
            store, digests = TokenStore.open(folder), _read_array(folder / _DIGESTS, np.uint64)
        except (ValueError, OSError):
            continue  # damaged, or from an earlier release and so without digests: it cannot be reused
        settings = {*request, "keep_end", "truncation_side"} - {"items_sha256"}
        is_same = all(store.facts.get(name) == request.get(name) for name in settings)
        if is_same and len(digests) == len(store) and (found is None or len(store) > len(found[0])):
            found = store, digests
    return found


def read_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Read the tokenizer of a Hugging Face directory. Raises ValueError if it is damaged."""
    from transformers import AutoTokenizer  # the import takes seconds, and in most jobs the store already exists

    with reading_foreign(f"{directory}: its tokenizer (tokenizer.json or similar)", "fetch the directory again"):
        _check_growth(directory / "tokenizer.json")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        special_tokens(tokenizer)
    return tokenizer


def _is_cut_at_start(directory: Path) -> bool:
    """True if a tokenizer cuts long texts at their start. Found without reading the tokenizer, which takes seconds."""
    path = directory / "tokenizer_config.json"
    with reading_foreign(path, "fetch the directory again"):
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "truncation_side" in facts:
            return bool(facts["truncation_side"] == "left")
    path = directory / "tokenizer.json"
    head = path.open("rb").read(4096) if path.is_file() else b""
    return re.search(rb'"truncation"\s*:\s*\{[^{}]*"direction"\s*:\s*"Left"', head) is not None


def _check_growth(path: Path) -> None:
    """Raise ValueError for a normalizer whose chained replacements could lengthen a text beyond any limit."""
    if not path.is_file():
        return
    normalizer = json.loads(path.read_text(encoding="utf-8")).get("normalizer") or {}
    growth, left = 1, [normalizer]
    while left:
        step = left.pop()
        left += step.get("normalizers") or []
        growth *= max(1, len(step.get("content") or ""))
        if growth > _MOST_GROWTH:
            raise ValueError(f"its normalizer can make a text more than {_MOST_GROWTH} times as long")


def item_texts(dataset: Dataset, prompt: str, keys: Sequence[str], separator: str) -> Iterator[list[str]]:
    """Yield the texts of the items 1, 2, ... in batches: prompt + "key: value" of each non-empty value."""
    return laid_out_texts(dataset.text(keys), prompt, keys, separator)


def laid_out_texts(texts: pa.Table, prompt: str, keys: Sequence[str], separator: str) -> Iterator[list[str]]:
    """Like `item_texts`, for a table of the text columns."""
    for batch in texts.to_batches(max_chunksize=_BATCH):
        columns = [batch.column(key).to_pylist() for key in keys]
        yield [
            prompt + separator.join(f"{key}: {value}" for key, value in zip(keys, values, strict=True) if value)
            for values in zip(*columns, strict=True)
        ]


def special_tokens(tokenizer: "PreTrainedTokenizerBase", keep_end: bool = False) -> tuple[list[int], list[int]]:
    """(ids before a text, ids after a text) that are kept in an item's tokens (see the module docstring).

    Raises:
        ValueError: no text of the vocabulary shows which tokens are special.
    """
    # Tokenizers do not list these tokens, so compare the tokens of a text with and without special tokens.
    for text in ("a", "the", "1", "title", *tokenizer.get_vocab()):
        try:
            plain, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
        except Exception:  # noqa: S112  # some tokenizers without a token for unknown words raise a plain Exception
            continue
        starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        if plain and len(starts) == 1:  # a text of unknown words may give no tokens
            break
    else:
        raise ValueError("its special tokens cannot be told from a text's")
    before, after = whole[: starts[0]], whole[starts[0] + len(plain) :]
    is_encoder = tokenizer.cls_token_id is not None and tokenizer.cls_token_id in before
    return before, after if is_encoder or keep_end else []


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], max_text_length: int, keep_end: bool = False
) -> list[list[int]]:
    """Token ids of each text with special tokens, cut to `max_text_length` (see the module docstring)."""
    # The text is cut before the special tokens are added, so that a trailing [SEP] survives the cut.
    before, after = special_tokens(tokenizer, keep_end)
    room = max(max_text_length - len(before) - len(after), 0)
    with reading_foreign(f"{tokenizer.name_or_path}: its tokenizer", "give one that has a token for unknown words"):
        plain = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    if tokenizer.truncation_side == "left":
        plain = [ids[max(len(ids) - room, 0) :] for ids in plain]
    return [(before + ids[:room] + after)[:max_text_length] for ids in plain]


def _write_store(
    folder: Path,
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    request: dict[str, Any],
    earlier: tuple[TokenStore, np.ndarray] | None,
) -> None:
    """Write the store's files; items with the same text as in the `earlier` store reuse its tokens."""
    prompt, keys, separator = request["prompt"], request["keys"], request["separator"]
    lengths, digests = [], []
    largest, first = -1, 0
    with (
        # Arrow needs the number of values in advance, so write the tokens to a raw file, which is mapped and rewritten.
        (folder / "values.raw").open("wb") as raw,
        tqdm(total=dataset.num_items, desc="tokenizing", delay=5) as bar,
    ):
        # The unknown item 0 has the prompt alone.
        for texts in itertools.chain([[prompt]], item_texts(dataset, prompt, keys, separator)):
            digests.append(_digests(texts))
            values, offsets = _tokens(tokenizer, texts, request, digests[-1], first, earlier)
            lengths.append(np.diff(offsets))
            largest = max(largest, int(values.max(initial=-1)))
            values.tofile(raw)
            first += len(texts)
            bar.update(len(texts))
    offsets = offsets_from_lengths(np.concatenate(lengths))
    total = int(offsets[-1])
    values = np.memmap(folder / "values.raw", np.int32, "r") if total else np.zeros(0, np.int32)
    _write_array(folder / "values.arrow", values)
    _write_array(folder / "offsets.arrow", offsets)
    _write_array(folder / _DIGESTS, np.concatenate(digests))
    del values  # releases the mapping: some systems cannot remove a mapped file
    (folder / "values.raw").unlink()
    facts = {**request, "items": len(offsets) - 1, "tokens": total, "vocab_size": largest + 1}
    (folder / "store.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _digests(texts: list[str]) -> np.ndarray:
    """Digest of each text, uint64 [n]."""
    return np.array([int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) for text in texts], np.uint64)


def _tokens(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    request: dict[str, Any],
    digests: np.ndarray,
    first: int,
    earlier: tuple[TokenStore, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """(packed tokens int32, offsets) of the items from number `first` on, which have these texts and digests."""
    known = np.zeros(len(texts), bool)
    if earlier is not None:
        old = earlier[1][first : first + len(texts)]
        known[: old.size] = old == digests[: old.size]
    new = np.flatnonzero(~known)
    length, keep_end = request["max_text_length"], request.get("keep_end", False)
    ids = tokenize(tokenizer, [texts[i] for i in new], length, keep_end) if new.size else []
    if earlier is None or not known.any():
        return np.fromiter((token for row in ids for token in row), np.int32), offsets_from_lengths(list(map(len, ids)))
    # Concatenate the reused and the new tokens, then gather every item's range from them.
    values, bounds = earlier[0].gather(first + np.flatnonzero(known))
    lengths = np.zeros(len(texts), np.int64)
    lengths[known], lengths[new] = np.diff(bounds), [len(row) for row in ids]
    starts = np.zeros(len(texts), np.int64)
    starts[known], starts[new] = bounds[:-1], len(values) + np.cumsum(lengths[new]) - lengths[new]
    every = np.concatenate([values, np.fromiter((token for row in ids for token in row), np.int32)])
    return every[concat_ranges(starts, lengths)], offsets_from_lengths(lengths)


def _write_array(path: Path, values: np.ndarray) -> None:
    """Write one array as an Arrow IPC file with a single record batch, so that it maps as contiguous memory."""
    batch = pa.record_batch({"values": pa.array(values)})
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)


def _read_facts(path: Path) -> dict[str, Any]:
    """Read `store.json` and check its numbers."""
    with error_location(path, _REMEDY):
        facts = json.loads(path.read_text(encoding="utf-8"))
    for name in ("items", "tokens", "vocab_size"):
        value = facts.get(name) if isinstance(facts, dict) else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{path}: {name} is {str(value)[:100]!r}, it must be a number from 0 on; {_REMEDY}")
    return dict(facts)


def _read_array(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """Read the array of `_write_array` as a view of the mapped file."""
    with error_location(path, _REMEDY), pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        kind = pa.from_numpy_dtype(dtype)
        if reader.schema.types != [kind] or reader.num_record_batches > 1:
            raise ValueError(f"it must hold one array of {kind}")
        if reader.num_record_batches == 0:
            return np.zeros(0, dtype)
        batch = reader.get_batch(0)
        batch.validate(full=True)
        return batch.column(0).to_numpy()
