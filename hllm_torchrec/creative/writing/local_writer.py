"""`LocalWriter`: answers of a causal language model in a Hugging Face directory, computed on this machine.

The model's chat template formats the conversation. Texts of items in a prompt may contain the names of special tokens.
Therefore the template is filled with marks instead of messages; then the text around the marks is tokenized with
special tokens, and the messages are tokenized as plain text.

Prompts are decoded in batches of similar lengths; the tokens that all prompts of a batch begin with are read once. An
answer depends on its prompt alone, except that rounding may decide between two tokens of practically equal probability.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hllm_torchrec.common.errors import configured_by
from hllm_torchrec.common.hashing import hash_texts
from hllm_torchrec.creative.writing.writer import Answer, Ask
from hllm_torchrec.data.token_store import read_tokenizer, special_tokens
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.models.model_files import vocabulary_head
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM
from hllm_torchrec.modules.creative.decode import DecodeOptions, decode

BATCH_PROMPTS, BATCH_POSITIONS = 32, 16_384
"""Largest numbers of prompts, and of positions of prompts and answers, of a batch. A killed build loses a batch."""


class LocalWriter:
    """Answers prompts with the model in `directory`.

    Raises:
        ValueError: the directory is damaged, or has no decoder, no tokenizer or no end token.
    """

    leaves_machine = ""

    def __init__(self, directory: str) -> None:
        if not (Path(directory) / "config.json").is_file():
            raise ValueError(f"--model {directory}: no config.json; give a model's directory (`hllm fetch smollm2`)")
        self.name = f"llm:{Path(directory).resolve().name}"
        self.tokenizer = read_tokenizer(Path(directory))
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"--model {directory}: its tokenizer has no end token (eos_token); choose another model")
        with configured_by("--model"):
            backbone = build_backbone(directory)
            self.llm = CreativeLLM(backbone, vocabulary_head(directory, backbone)).eval()
        words = backbone.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > words:
            raise ValueError(
                f"--model {directory}: its tokenizer has {len(self.tokenizer)} tokens, its model {words}: give the "
                "directory of a model with its own tokenizer"
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.llm.to(self.device)
        self._positions = getattr(backbone.config, "max_position_embeddings", None)

    def write(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        """Yield the failures of prompts that are too long, then the answers, those to short prompts first."""
        ids = [self.prompt_ids(ask) for ask in asks]
        fitting = []
        for index, ask in enumerate(asks):
            length = len(ids[index])
            if self._positions is not None and length + ask.max_tokens > self._positions:
                error = f"{length} tokens and --answer-tokens {ask.max_tokens} exceed {self._positions} positions"
                yield Answer(index, None, error)
            else:
                fitting.append(index)
        for batch in _batches(fitting, asks, ids):
            decoded = self._decode([ids[index] for index in batch], [asks[index] for index in batch])
            for index, tokens in zip(batch, decoded, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                yield Answer(index, text, tokens=(len(ids[index]), len(tokens)))

    def prompt_ids(self, ask: Ask) -> list[int]:
        """Return the token ids of the conversation up to the answer."""
        parts = (("system", ask.system), ("user", ask.prompt))
        contents = {hash_texts([name, text])[:20]: text for name, text in parts}
        system, user = contents
        if self.tokenizer.chat_template is None:
            begin = special_tokens(self.tokenizer)[0]
            return [*begin, *self._plain_ids(f"{ask.system}\n\n{ask.prompt}\n\n")]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        laid_out = self._template(messages)
        if system not in laid_out:  # the template ignores system messages
            laid_out = self._template([{"role": "user", "content": f"{system}\n\n{user}"}])
        ids: list[int] = []
        rest = laid_out
        for mark, text in contents.items():
            before, _, rest = rest.partition(mark)
            ids += [*self.tokenizer(before, add_special_tokens=False)["input_ids"], *self._plain_ids(text)]
        return [*ids, *self.tokenizer(rest, add_special_tokens=False)["input_ids"]]

    def _template(self, messages: list[dict[str, str]]) -> str:
        # By default Qwen3's template lets the model reason before it answers. Other templates ignore the option.
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return str(self.tokenizer.apply_chat_template(messages, **options))

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _decode(self, ids: Sequence[list[int]], asks: Sequence[Ask]) -> list[list[int]]:
        """Tokens of the answers to prompts with the given token ids, which have the same parameters."""
        shared = min(len(os.path.commonprefix(list(ids))), min(map(len, ids)) - 1)
        lengths = torch.tensor([len(one) - shared for one in ids])
        after = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
        for row, one in zip(after, ids, strict=True):
            row[: len(one) - shared] = torch.tensor(one[shared:])
        before = torch.tensor(ids[0][:shared], dtype=torch.int64).expand(len(ids), -1)
        width = self.llm.backbone.get_input_embeddings().weight.shape[1]
        soft = torch.empty(len(ids), 0, width, device=self.device)
        options = DecodeOptions(int(self.tokenizer.eos_token_id), asks[0].max_tokens, asks[0].temperature)
        # The seed depends on the prompt alone, so a resumed build writes the same texts.
        seeds = [int(ask.key(self.name)[:15], 16) for ask in asks]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        found = decode(
            self.llm,
            before.to(self.device),
            after.to(self.device),
            soft,
            options,
            generators,
            torch.arange(len(ids), device=self.device),
            after_lengths=lengths.to(self.device),
        )
        return [[token for token in row if token >= 0] for row in found.tokens.tolist()]


def _batches(indices: Sequence[int], asks: Sequence[Ask], ids: Sequence[list[int]]) -> Iterator[list[int]]:
    """Yield indices of prompts with the same parameters, in order of their lengths, in batches of a limited size."""

    def parameters(index: int) -> tuple[int, float]:
        return asks[index].max_tokens, asks[index].temperature

    batch: list[int] = []
    for index in sorted(indices, key=lambda index: (*parameters(index), len(ids[index]))):
        positions = (len(batch) + 1) * (len(ids[index]) + asks[index].max_tokens)
        is_full = len(batch) == BATCH_PROMPTS or positions > BATCH_POSITIONS
        if batch and (is_full or parameters(index) != parameters(batch[0])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
