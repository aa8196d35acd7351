"""Personalized titles: savings by clusters, shared prompts, packing and soft tokens, and the time of a lookup.

    python scripts/bench/bench_creator.py [--quick] [--out FILE]

The Creative LLM has the shape of SmolLM2 with 4 layers and random weights, in fp32. Both sides of a ratio have the same
weights. Unless stated otherwise, both sides decode 64 titles at a time (a batch of `hllm create` has up to 16,384
tokens), and in training, word vectors and vocabulary head are frozen on both, as in configs/creator/ml100k.yaml. The
bench first checks that both sides produce the same tokens or losses. A ratio is naive / ours, the median over pairs of
measurements that are made one after the other:

    per_user_vs_per_cluster  naive: transformers' `generate` for each (user, item), one after the other, for 943 users;
                             ours: titles for 16 clusters. Both sides are measured on 64 pairs and scaled. Goal: at
                             least 0.9 x 943 / 16 = 53
    batched                  naive: our decoding in batches for 943 users; otherwise the same. Goal: 53
    pruned                   naive: titles for 64 clusters; ours: titles for 8 of them. Measured on a batch of 256
                             titles of each, of 4 items and of 32, and scaled. Goal: 7.2
    item_kv                  naive: the prompt (230 tokens before {user}) is read for each of 16 clusters; ours: it is
                             read once. 12 layers, 4 items. Goal: 4
    kv_cache                 naive: the whole sequence is read again for each of 32 new tokens; ours: keys and values of
                             the previous tokens are cached. 64 prompts of 64 tokens. Goal: 8
    kv_cache_few             the same with 8 prompts, so that each decoding step reads all weights for only 8 rows
    train_step               naive: `AutoModelForCausalLM` with labels, forward and backward, for 32 texts of 35 tokens,
                             of which 12 are the response. Goal: 1.5
    train_step_memory        the same, peak of the resident set in separate processes. Goal: 3
    train_words              as train_step, with words and head trained on both sides
    train_words_memory       the same
    train_padded             naive: 4 texts of 35 tokens padded to 512. Goal: 8
    soft_vs_text             naive: the history is 280 more tokens of the prompt; ours: only the soft token. 16 texts.
                             Goal: 5
    users_once               naive: one pass of the user encoder over 100 events for each of 8 creatives; ours: one pass
                             for all. 32 users. Goal: 4

`lookup` gives the microseconds of `Creatives.get` among 10^6 titles for 10^5 users (goal: below 50).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from bench_loss import measured_apart
from benchmarking import (
    SMOLLM2,
    alternate,
    arguments,
    keep_large_buffers,
    medians,
    ratio,
    report,
    reset_high_water_mark,
    resident,
    say,
    timed,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hllm_torchrec.creative.clusters import SCHEMA as USERS
from hllm_torchrec.creative.clusters import Centers, write_clusters
from hllm_torchrec.creative.mapped_table import hash_order
from hllm_torchrec.creative.titles import SCHEMA, Creatives, commit, prepare_folder
from hllm_torchrec.models.backbones import backbone_config, build_backbone
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM, PackedTexts
from hllm_torchrec.modules.creative.decode import DecodeOptions, decode, run
from hllm_torchrec.modules.creative.decode_cache import PrefixPlan
from hllm_torchrec.modules.encoders.base import Queries
from hllm_torchrec.modules.encoders.sasrec import SASRec
from hllm_torchrec.modules.encoders.shapes import SASRecShape

USERS_OF_ALL, CLUSTERS = 943, 16
DEEP = 12
"""Layers of the model of `item_kv`: with 4, half of the operations are those of the vocabulary head."""
NEVER = -7
"""An id of an end token that no model generates, so that all titles have the same length."""
SHAPE = {**SMOLLM2, "num_hidden_layers": 4, "tie_word_embeddings": True}
TINY = {**SHAPE, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY |= {"num_hidden_layers": 2, "vocab_size": 90}


class Models:
    """A causal language model of transformers, and a `CreativeLLM` with the same weights."""

    def __init__(self, shape: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.plain = AutoModelForCausalLM.from_config(backbone_config(None, shape), trust_remote_code=False).eval()
        backbone = build_backbone(None, shape)
        backbone.load_state_dict(self.plain.model.state_dict())
        self.ours = CreativeLLM(backbone).eval()
        self.width, self.words = shape["hidden_size"], shape["vocab_size"]

    def freeze_words(self) -> None:
        """Freeze word vectors and head of both models."""
        for model in (self.plain, self.ours.backbone):
            model.get_input_embeddings().weight.requires_grad_(False)

    def tokens(self, *size: int) -> Tensor:
        """Return random tokens."""
        return torch.randint(self.words, size)

    def soft(self, number: int) -> Tensor:
        """Return random soft tokens [n, 1, C] with the RMS of the word embeddings."""
        return torch.randn(number, 1, self.width) * self.ours.word_scale


def generated(models: Models, before: Tensor, after: Tensor, soft: Tensor, most: int) -> Tensor:
    """Generate tokens [n, most] by transformers' `generate`, one user after the other."""
    words, rows = models.plain.get_input_embeddings(), []
    for one in soft:
        whole = torch.cat([words(before), one, words(after)])[None]
        options = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "eos_token_id": None}
        rows.append(models.plain.generate(inputs_embeds=whole, pad_token_id=0, **options)[0])
    return torch.stack(rows)


def written(models: Models, before: Tensor, after: Tensor, soft: Tensor, most: int, item_of: Any = None) -> Tensor:
    """Generate tokens [n, most] by our decoding."""
    return decode(models.ours, before, after, soft, DecodeOptions(NEVER, most), item_of=item_of).tokens


def without_prefix(models: Models, text: Tensor, of: Tensor, soft: Tensor, most: int) -> Tensor:
    """Generate tokens [n, most] by our decoding, which reads the prompt text[of] in the rows of each user."""
    llm, words = models.ours, models.ours.embed(text)[of].detach()
    none = torch.empty(1, 0, dtype=torch.int64)
    return decode(llm, none, none, torch.cat([words, soft], 1), DecodeOptions(NEVER, most)).tokens


@torch.no_grad()
def without_cache(models: Models, before: Tensor, after: Tensor, soft: Tensor, most: int) -> Tensor:
    """Generate tokens [n, most]; each step reads the complete sequence again."""
    llm, number = models.ours, len(soft)
    rows = torch.cat([llm.embed(before).expand(number, -1, -1), soft, llm.embed(after).expand(number, -1, -1)], 1)
    found = []
    for _ in range(most):
        hidden = run(llm, rows, PrefixPlan(*rows.shape[:2], rows.device))
        found.append((hidden[:, -1] @ llm.head_weight.T).argmax(-1))
        rows = torch.cat([rows, llm.embed(found[-1])[:, None]], 1)
    return torch.stack(found, 1)


def compare(sides: Mapping[str, Callable[[], Any]], rounds: int, scale: float = 1.0) -> dict[str, Any]:
    """Measure two sides in turn, the naive one first: their ratio, times `scale`, and their median seconds."""
    times = alternate({name: timed(run) for name, run in sides.items()}, rounds, seconds=0.2)
    naive, ours = times.values()
    return {"seconds": medians(times), "ratio": ratio(naive, ours, scale)}


def same(one: Tensor, other: Tensor) -> None:
    """Assert that both sides give the same tokens."""
    assert torch.equal(one, other), "the sides differ"


def decoding(models: Models, options: argparse.Namespace, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure the ratios of decoding."""
    tiny = options.tiny
    most, number = (3, 8) if tiny else (16, 64)
    before, after, soft = models.tokens(12), models.tokens(25), models.soft(number)
    groups = max(1, number // CLUSTERS)  # number of items in a batch of titles for all clusters
    of, items = torch.arange(number) * groups // number, models.tokens(groups, 25)
    items[0] = after
    few = slice(0, 4)

    def of_clusters(clusters: int) -> Tensor:
        each = max(1, clusters // 8) if tiny else clusters
        count = (16 if tiny else 256) // each
        item_of = torch.arange(count).repeat_interleave(each)
        those = items[:1].expand(count, -1)
        return written(models, before.expand(count, -1), those, kinds[:each].repeat(count, 1, 1), most, item_of)

    kinds = models.soft(64)
    same(generated(models, before, after, soft[few], most), written(models, before, after, soft[few], most))
    ours = lambda: written(models, before.expand(groups, -1), items, soft, most, of)  # noqa: E731
    scale = USERS_OF_ALL / CLUSTERS
    found = {
        "per_user_vs_per_cluster": compare(
            {"generate": lambda: generated(models, before, after, soft, most), "clusters": ours}, rounds, scale
        ),
        "batched": compare(
            {"users": lambda: written(models, before, after, soft, most), "clusters": ours}, rounds, scale
        ),
    }
    found["pruned"] = compare({"all": partial(of_clusters, 64), "best": partial(of_clusters, 8)}, rounds, 64 / 8)
    return found


def caches(models: Models, deep: Models, options: argparse.Namespace, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure the ratios of cached keys and values. deep: the model of `item_kv`."""
    tiny = options.tiny
    most, items = 3 if tiny else 16, 2 if tiny else 4
    text, soft = deep.tokens(items, 20 if tiny else 230), deep.soft(CLUSTERS * items)
    of, none = torch.arange(items).repeat_interleave(CLUSTERS), torch.empty(items, 0, dtype=torch.int64)
    sides = {
        "again": lambda: without_prefix(deep, text, of, soft, most),
        "shared": lambda: written(deep, text, none, soft, most, of),
    }
    same(*(side() for side in sides.values()))
    found = {"item_kv": compare(sides, max(3, rounds // 2))}
    before, after = models.tokens(12), models.tokens(5 if tiny else 51)  # 64 positions
    for name, number in (("kv_cache_few", 8), ("kv_cache", 8 if tiny else 64)):
        few, longest = models.soft(number), 4 if tiny else 32
        sides = {
            "whole": partial(without_cache, models, before, after, few, longest),
            "cache": partial(written, models, before, after, few, longest),
        }
        same(*(side() for side in sides.values()))
        found[name] = compare(sides, max(3, rounds // 2))
    return found


def packed(models: Models, number: int, prompt: int, response: int) -> PackedTexts:
    """Return random packed texts of equal lengths."""
    length = prompt + response
    return PackedTexts(
        token_ids=models.tokens(number * length),
        cu_seqlens=torch.arange(number + 1) * length,
        soft_at=torch.full((number,), prompt // 2),
        response_from=torch.full((number,), prompt),
        prefix_ids=torch.empty(0, dtype=torch.int64),
    )


def our_step(models: Models, texts: PackedTexts, soft: Tensor) -> Tensor:
    """Run forward and backward of the mean loss of the responses' tokens; gradients are left in `.grad`."""
    models.ours.zero_grad()
    output = models.ours(texts, soft)
    loss = output.nll.sum() / output.tokens.sum()
    loss.backward()
    return loss.detach()


def plain_step(models: Models, texts: PackedTexts, soft: Tensor, padded: int = 0) -> Tensor:
    """Run the same step by transformers' model with labels; texts are padded on the right to `padded` tokens."""
    models.plain.zero_grad()
    words = models.plain.get_input_embeddings()(texts.token_ids.view(len(soft), -1))
    at, begins = int(texts.soft_at[0]), int(texts.response_from[0])
    rows = torch.cat([words[:, :at], soft, words[:, at:]], 1)
    labels = texts.token_ids.view(len(soft), -1).clone()
    labels[:, :begins] = -100
    labels = torch.cat([labels.new_full((len(soft), 1), -100), labels], 1)
    mask = torch.ones_like(labels)
    extra = max(0, padded - rows.shape[1])
    rows, mask = nn.functional.pad(rows, (0, 0, 0, extra)), nn.functional.pad(mask, (0, extra))
    labels = nn.functional.pad(labels, (0, extra), value=-100)
    loss = models.plain(inputs_embeds=rows, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.detach()


def training(models: Models, options: argparse.Namespace, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure the ratios of training steps."""
    number, lengths = (4, (6, 3)) if options.tiny else (32, (22, 12))
    texts, soft, longest = packed(models, number, *lengths), models.soft(number), 24 if options.tiny else 512
    ours = lambda: our_step(models, texts, soft)  # noqa: E731
    torch.testing.assert_close(plain_step(models, texts, soft), ours(), rtol=1e-4, atol=1e-4)
    found = {"train_words": compare({"labels": lambda: plain_step(models, texts, soft), "packed": ours}, rounds)}
    models.freeze_words()
    found["train_step"] = compare({"labels": lambda: plain_step(models, texts, soft), "packed": ours}, rounds)
    few, few_soft = packed(models, 4, *lengths), models.soft(4)
    padded = lambda: plain_step(models, few, few_soft, longest)  # noqa: E731
    least = max(3, rounds // 2)
    found["train_padded"] = compare({"padded": padded, "packed": lambda: our_step(models, few, few_soft)}, least)
    texts, soft = packed(models, number // 2, *lengths), models.soft(number // 2)
    history = packed(models, number // 2, lengths[0] + (20 if options.tiny else 280), lengths[1])
    sides = {"text": lambda: our_step(models, history, soft), "soft": lambda: our_step(models, texts, soft)}
    return found | {"soft_vs_text": compare(sides, least)}


def users_once(options: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """Measure passes of a user encoder: one for all creatives of a user, or one for each creative."""
    users, events, creatives, width = (2, 6, 3, 8) if options.tiny else (32, 100, 8, 64)
    encoder = SASRec(SASRecShape(width=width, layers=2, heads=2, max_positions=256)).eval()
    x, queries = torch.randn(users, events, width), torch.randn(users, creatives, width)
    seen = torch.randint(1, events, (users, creatives)).sort(1).values

    def run(copies: int) -> Tensor:
        own = x.repeat_interleave(copies, 0)
        each = creatives // copies
        times = torch.arange(events).repeat(len(own))
        offsets = torch.arange(len(own) + 1)
        asked = Queries(queries.reshape(-1, width), offsets * each, seen.reshape(-1), seen.reshape(-1))
        with torch.no_grad():
            return encoder(own.reshape(-1, width), offsets * events, times, asked, times)[1]

    torch.testing.assert_close(run(creatives), run(1), rtol=1e-4, atol=1e-4)
    return compare({"each": lambda: run(creatives), "once": lambda: run(1)}, rounds)


def lookup(options: argparse.Namespace) -> dict[str, float]:
    """Measure the mean microseconds of random lookups, and the bytes of the files."""
    users, items, titles = (200, 50, 4) if options.tiny else (100_000, 125_000, 8)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw_users, raw_items = [f"user-{n}" for n in range(users)], [f"item-{n}" for n in range(items)]
        hashes, order = hash_order(raw_users)
        table = pa.table(
            [[raw_users[n] for n in order], random.integers(titles - 1, size=users), random.random(users)], schema=USERS
        )
        centers = Centers("euclidean", *(np.ones(s, np.float32) for s in (2, 2, (titles - 1, 2), (titles - 1, 2))))
        facts = {"settings": {"metric": "euclidean", "least": 10}, "source": {}, "mean_distance": 1.0}
        facts |= {"users": {"path": "", "version": 1}, "fitted": {"mean_distance": 1.0}}
        clusters = write_clusters(folder / "clusters", facts, centers, table, hashes)
        number = items * titles
        columns = {
            "raw_item_id": np.repeat(raw_items, titles),
            "cluster": np.tile(np.arange(-1, titles - 1), items),
            "match": np.zeros(number),
            "key": np.char.add("key-", np.arange(number).astype(str)),
            "text": np.char.add("A title of a film for a kind of viewer, number ", np.arange(number).astype(str)),
            "log_prob": np.zeros(number),
            "tokens": np.zeros(number, int),
            "fallback": np.zeros(number, bool),
            "reasons": np.zeros(number, "U1"),
        }
        prepare_folder(folder / "titles")
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA]
        commit(
            folder / "titles",
            pa.table(arrays, schema=SCHEMA),
            {"clusters": "../clusters", "centers": clusters.fingerprint, "origin": {}},
        )
        creatives = Creatives.open(folder / "titles")
        asked = list(zip(random.integers(users, size=20_000).tolist(), random.integers(items, size=20_000).tolist()))
        pairs = [(raw_users[user], raw_items[item]) for user, item in asked]
        for user, item in pairs[:1000]:
            creatives.get(user, item)
        began = time.perf_counter()
        for user, item in pairs:
            creatives.get(user, item)
        return {
            "titles": number,
            "users": users,
            "microseconds": (time.perf_counter() - began) / len(pairs) * 1e6,
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        }


SIDES = {"labels": plain_step, "packed": our_step}


def measure(side: str, tiny: bool) -> int:
    """Return the peak bytes of a step above the bytes before it, after a small warm-up step. Needs a separate process.

    side: name in SIDES; with the suffix " words", words and head are trained.
    """
    models, step = Models(TINY if tiny else SHAPE), SIDES[side.split()[0]]
    if not side.endswith("words"):
        models.freeze_words()
    step(models, packed(models, 2, 4, 2), models.soft(2))
    number, lengths = (4, (6, 3)) if tiny else (32, (22, 12))
    texts, soft = packed(models, number, *lengths), models.soft(number)
    reset_high_water_mark()
    before = resident("VmRSS")
    step(models, texts, soft)
    return resident("VmHWM") - before


def memory(tiny: bool, suffix: str) -> dict[str, Any]:
    """Measure the peaks of both sides, each in a separate process; with tiny shapes in this one, without meaning."""
    peaks = {
        side: max(1, measure(side + suffix, tiny)) if tiny else measured_apart(__file__, "--measure", side + suffix)
        for side in SIDES
    }
    return {"peak_bytes": peaks, "ratio": peaks["labels"] / peaks["packed"]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    parser = arguments(__doc__)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(measure(options.measure, options.tiny))
        return {}
    torch.manual_seed(0)
    models, rounds = Models(TINY if options.tiny else SHAPE), 2 if options.tiny else 5 if options.quick else 7
    parts = training(models, options, rounds)
    say("training steps measured")
    parts |= decoding(models, options, rounds)
    deep = models if options.tiny else Models({**SHAPE, "num_hidden_layers": DEEP})
    parts |= caches(models, deep, options, rounds)
    say("decoding measured")
    parts["users_once"] = users_once(options, rounds)
    parts["train_step_memory"] = memory(options.tiny, "")
    parts["train_words_memory"] = memory(options.tiny, " words")
    found = lookup(options)
    ratios = {name: part.pop("ratio") for name, part in parts.items()}
    say(f"{parts}; lookup {found['microseconds']:.1f} microseconds")
    shapes = {"layers": models.ours.backbone.config.num_hidden_layers, "width": models.width, "words": models.words}
    shapes |= {"users": USERS_OF_ALL, "clusters": CLUSTERS, "rounds": rounds}
    result = {"ratios": ratios, "measured": parts, "lookup": found, "shapes": shapes}
    return report("creator", options, result)


if __name__ == "__main__":
    if "--measure" not in sys.argv:
        keep_large_buffers()
    main()
