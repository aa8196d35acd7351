"""`TextCosine`: cosine similarity of texts by a sentence encoder, for `hllm creatives build --encoder`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.config.encoders import ItemLLMConfig
from hllm_torchrec.data.token_store import read_tokenizer, tokenize
from hllm_torchrec.models.build import build_text_llm
from hllm_torchrec.models.text_format import text_format

_AT_ONCE = 64
_LONGEST = 256
"""Maximum number of tokens of a text; longer texts are truncated."""


class TextCosine:
    """Embeds texts with the sentence encoder in `directory`, with the pooling and prompt that its files specify.

    Raises:
        ValueError: the directory is damaged, or does not specify the pooling.
    """

    def __init__(self, directory: str) -> None:
        section = ItemLLMConfig(pretrained=directory, trainable=False)
        self.form = text_format("item_llm", section)
        if self.form.pooling == "item":
            raise ValueError(
                f"--encoder {directory}: says nothing of pooling; give a sentence encoder's directory, such as that of "
                "`hllm fetch minilm`"
            )
        self.tokenizer = read_tokenizer(Path(directory))
        llm = build_text_llm("item_llm", section, trains=False)
        assert llm is not None
        self.llm = llm.eval()

    def cosines(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """Return the cosine of each text in `texts` with the text at the same position in `others`."""
        found: list[float] = F.cosine_similarity(self._embed(texts), self._embed(others), dim=-1).tolist()
        return found

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        """Embed n texts; returns [n, E] float32."""
        rows = []
        for first in range(0, len(texts), _AT_ONCE):
            some = [self.form.prompt + text for text in texts[first : first + _AT_ONCE]]
            ids = tokenize(self.tokenizer, some, _LONGEST, self.form.keeps_end)
            offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
            rows.append(self.llm(torch.tensor([token for text in ids for token in text]), offsets))
        return torch.cat(rows)
