"""`LocalWriter`: answers of a causal language model in a Hugging Face directory, computed on this machine.

The model's chat template formats the conversation. Texts of items in a prompt may contain the names of special tokens.
Therefore the template is filled with marks instead of messages; then the text around the marks is tokenized with
special tokens, and the messages are tokenized as plain text.

Prompts are decoded one at a time. A server (writer `openai`) is faster, because it batches prompts.
"""

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
        """Yield the answers in the order of the prompts."""
        for index, ask in enumerate(asks):
            ids = self.prompt_ids(ask)
            if self._positions is not None and len(ids) + ask.max_tokens > self._positions:
                error = f"{len(ids)} tokens and --answer-tokens {ask.max_tokens} exceed {self._positions} positions"
                yield Answer(index, None, error)
                continue
            tokens = self._decode(ids, ask)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            yield Answer(index, text, tokens=(len(ids), len(tokens)))

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

    def _decode(self, ids: list[int], ask: Ask) -> list[int]:
        before, after = (torch.tensor(part, device=self.device) for part in (ids[:-1], ids[-1:]))
        width = self.llm.backbone.get_input_embeddings().weight.shape[1]
        soft = torch.empty(1, 0, width, device=self.device)
        options = DecodeOptions(int(self.tokenizer.eos_token_id), ask.max_tokens, ask.temperature)
        # The seed is derived from the key of the prompt, so that a resumed build generates the same texts.
        seed = int(ask.key(self.name)[:15], 16)
        found = decode(self.llm, before, after, soft, options, [torch.Generator().manual_seed(seed)])
        tokens: list[int] = found.tokens[0].tolist()
        return [token for token in tokens if token >= 0]
