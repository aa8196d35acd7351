"""Texts to vectors: the job of `hllm embed` against sentence-transformers and plain transformers.

    python scripts/bench/bench_encode.py [--quick] [--minilm DIR] [--smollm2 DIR] [--out FILE]

Texts of invented words have 10 to 256 tokens, evenly spread in the logarithm. MiniLM is pooled by the mean, SmolLM2's
first layers by the last token. In each dtype every side starts from the texts and ends with vectors, in memory or (side
`ours`) in a store:

    ours                   tokenizes all texts, then runs `embed_items` with its commit, in `parallel.precision`
    transformers           tokenizes, then runs `AutoModel` with SDPA in the dtype on padded batches of 32 sorted by
                           length
    sentence_transformers  `SentenceTransformer.encode` of a model in the dtype, with its own sorting and batches of 32;
                           only if the extra `sentences` is installed

`encode_<model>_<dtype>` is seconds of the faster of the other two / of ours; the sides alternate, and the bench stops
if the cosine of our vectors and those of another side falls below .999.
"""

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import SMALL
from bench_store import text_experiment
from benchmarking import (
    ROOT,
    Ratio,
    alternate,
    arguments,
    keep_large_buffers,
    medians,
    ratio,
    report,
    say,
    timed,
    why_no_bf16,
)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.schema import Config, FeatureConfig, ParallelConfig
from hllm_torchrec.data.token_store import TokenStore, tokenize
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.inference.item_embedding import embed_items
from hllm_torchrec.models.text_format import text_format
from hllm_torchrec.store import EmbeddingStore

SHORTEST, LONGEST, BATCH = 10, 256, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INSTALLED = importlib.util.find_spec("sentence_transformers") is not None


@dataclass(frozen=True)
class Model:
    """A text model. folder: its Hugging Face directory; layers: number of first layers that are used (None: all);
    texts: number of texts of a call."""

    name: str
    folder: Path
    pooling: str
    layers: int | None
    texts: int


def invented_texts(model: Model) -> list[str]:
    """Random texts of words that are one token each, which give 10 to 256 tokens."""
    tokenizer, rng = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False), np.random.default_rng(0)
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isascii() and word.isalpha() and word.islower()]
    words = [word for word in words[:20_000:5] if len(tokenizer.tokenize(f"a {word}")) == 2] or words
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST - 2), model.texts)).astype(int)
    return [" ".join(rng.choice(words, length)) for length in lengths]


class Ours:
    """The library's job, from texts to a store."""

    def __init__(self, model: Model, texts: list[str], precision: str, folder: Path) -> None:
        section = ItemLLMConfig(
            pretrained=str(model.folder), layers=model.layers, pooling=model.pooling, max_text_length=LONGEST
        )  # type: ignore[arg-type]
        config = Config(
            item_llm=section,
            user=UserEncoderConfig(shape=SMALL | {"vocab_size": 8}),
            features=FeatureConfig(item_id=False, action=False, time_depth=0),
            parallel=ParallelConfig(precision=precision),  # type: ignore[arg-type]
        )
        self.texts, self.form = texts, text_format("item_llm", section)
        self.tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
        self.experiment = text_experiment(config, self.tokens())
        self.encoder = self.experiment.text_encoders["item_llm"]
        self.folder = folder / f"{model.name}-{precision}"

    def tokens(self) -> TokenStore:
        """Tokenize the texts."""
        ids = [[], *tokenize(self.tokenizer, self.texts, LONGEST, self.form.keeps_end)]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        facts = {"tokenizer": "", "prompt": "", "keys": [], "separator": "", "max_text_length": LONGEST}
        return TokenStore(Path("invented"), np.concatenate(ids).astype(np.int32), offsets, facts)

    def __call__(self) -> None:
        """Embed every text once, into a new store."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.encoder.tokens = self.tokens()
        embed_items(self.experiment, self.folder)

    def vectors(self) -> Tensor:
        """Return the embeddings that the last call stored."""
        return EmbeddingStore.open(self.folder).snapshot().gather(self.experiment.dataset.items["raw_item_id"])[0]


class Transformers:
    """Plain transformers on sorted, padded batches."""

    def __init__(self, model: Model, texts: list[str], dtype: torch.dtype) -> None:
        self.texts, self.pooling = texts, model.pooling
        self.tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
        layers = {} if model.layers is None else {"num_hidden_layers": model.layers}
        self.model = AutoModel.from_pretrained(
            model.folder,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            **layers,
        ).eval()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Embed every text once."""
        ids = self.tokenizer(self.texts, truncation=True, max_length=LONGEST)["input_ids"]
        order, found = np.argsort([-len(row) for row in ids], kind="stable"), []
        for start in range(0, len(ids), BATCH):
            rows = [ids[number] for number in order[start : start + BATCH]]
            padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
            mask = (torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()
            hidden = self.model(input_ids=padded, attention_mask=mask).last_hidden_state
            if self.pooling == "mean":
                found.append((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))
            else:
                found.append(hidden[torch.arange(len(rows)), mask.sum(1) - 1])
        return torch.cat(found).float()[torch.from_numpy(np.argsort(order, kind="stable"))]


def sentence_transformer(model: Model, texts: list[str], dtype: torch.dtype, folder: Path) -> Callable[[], Tensor]:
    """The side of sentence-transformers; folder: for links to the model's files."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    # With a chat template, sentence-transformers would put every text into a conversation.
    linked = folder / f"links-{model.name}"
    linked.mkdir(exist_ok=True)
    for file in model.folder.iterdir():
        if file.name != "chat_template.jinja" and not (linked / file.name).exists():
            (linked / file.name).symlink_to(file.resolve())
    layers = {} if model.layers is None else {"num_hidden_layers": model.layers}
    words = Transformer(str(linked), max_seq_length=LONGEST, model_kwargs={"dtype": dtype}, config_kwargs=layers)
    words.tokenizer.pad_token = words.tokenizer.pad_token or words.tokenizer.eos_token
    mode = "mean" if model.pooling == "mean" else "lasttoken"
    whole = SentenceTransformer(modules=[words, Pooling(words.auto_model.config.hidden_size, mode)], device="cpu")
    return lambda: whole.encode(texts, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False).float()


def smallest(ratios: Sequence[Ratio]) -> Ratio:
    """The smallest ratio, with the largest spread of all: if one ratio is refused, the smallest is unknown."""
    found = Ratio(min(ratios))
    found.spread = max((one.spread for one in ratios if one.spread is not None), default=None)
    return found


def compare(model: Model, precision: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Ratios and seconds of one model in one dtype."""
    texts, dtype = invented_texts(model), DTYPES[precision]
    ours, plain = Ours(model, texts, precision, folder), Transformers(model, texts, dtype)
    others: dict[str, Callable[[], Tensor]] = {"transformers": plain}
    if INSTALLED:
        others["sentence_transformers"] = sentence_transformer(model, texts, dtype, folder)
    ours()
    for side, run in others.items():
        least = torch.cosine_similarity(ours.vectors(), run()).min().item()
        if least < 0.999:
            raise AssertionError(f"{model.name} {precision}: the least cosine of ours and {side} is {least:.4f}")
    times = alternate({"ours": ours} | {side: timed(run) for side, run in others.items()}, repeats, warmup=0)
    seconds, name = medians(times), f"encode_{model.name}_{precision}"
    say(f"{name}: " + ", ".join(f"{side} {len(texts) / value:.0f} items/s" for side, value in seconds.items()))
    ratios = {f"{name}_vs_{side}": ratio(times[side], times["ours"]) for side in others}
    tokens = int(ours.encoder.tokens.offsets[-1])
    return {"ratios": {name: smallest(list(ratios.values())), **ratios}, "seconds": times, "tokens": tokens}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    parser, models = arguments(__doc__), ROOT / ".cache" / "models"
    parser.add_argument("--minilm", type=Path, default=models / "all-minilm-l6-v2", help="directory of MiniLM")
    parser.add_argument("--smollm2", type=Path, default=models / "smollm2-135m-instruct", help="directory of SmolLM2")
    parser.add_argument("--texts", type=int, help="texts of a call (default: 1,024, for SmolLM2 256; --quick: half)")
    options: argparse.Namespace = parser.parse_args(argv)
    share = 2 if options.quick else 1
    compared = [
        Model("minilm", options.minilm, "mean", None, options.texts or 1024 // share),
        Model("smollm2", options.smollm2, "last", None if options.tiny else 6, options.texts or 256 // share),
    ]
    init_distributed()
    repeats = 1 if options.tiny else 3 if options.quick else 5
    found, left_out = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for model in compared:
            for precision in DTYPES:
                name, reason = f"{model.name}_{precision}", why_no_bf16() if precision == "bf16" else None
                if reason is None:
                    found[name] = compare(model, precision, repeats, Path(folder))
                else:
                    left_out[name] = reason
    destroy_distributed()
    if not INSTALLED:
        left_out["sentence_transformers"] = "not installed: pip install 'hllm_torchrec[sentences]'"
    result = {
        "ratios": {ratio: value for part in found.values() for ratio, value in part["ratios"].items()},
        "shapes": {name: {"tokens": part["tokens"]} for name, part in found.items()},
        "seconds": {name: part["seconds"] for name, part in found.items()},
        "left_out": left_out,
    }
    return report("encode", options, result)


if __name__ == "__main__":
    keep_large_buffers()
    main()
