"""The embedding store against plain files and Lance, and the embedding job against the Item LLM alone.

    python scripts/bench/bench_store.py [--quick] [--only store refresh job] [--out FILE]

- `store_write_vs_plain`: writing 10^6 x 576 fp16 vectors with string ids, in blocks: seconds of a plain file (the bytes
  of the vectors, then fsync) / seconds of a commit (the same bytes, and checksums, ids, content hashes, index and
  manifest, each synced). `store_write_bound` is what this ratio could reach if everything that a commit can do on
  another thread (checksums, syncs) took no time: plain file / (plain file + check for infinities + index of the ids).
- `store_gather_vs_memmap`: look-up of 4,096 random ids: seconds of numpy's `memmap[rows]` with known row numbers /
  seconds of `Snapshot.gather`, in a store of int64 ids. `_strings`: the store has string ids; `_strings_dict`: it has
  string ids, and the memory map's side first finds the row numbers in a Python dict. Both sides return fp16, and both
  files are in the page cache; the bench stops if the vectors differ.
- `store_write_vs_lance`, `store_gather_vs_lance`, `store_upsert_vs_lance`: seconds of Lance / seconds of the store, if
  the package pylance is installed: writing the same rows with int64 ids to a new dataset; gathering 4,096 random rows
  (Lance gets row numbers, the store looks ids up); replacing 1,000 rows in one commit (Lance has a B-tree of the ids,
  which is built before).
- `refresh_vs_full`: seconds of `embed_items` when the store lacks 1,000 of 100,000 items / seconds for all
  100,000. Both include everything after the model is loaded: hash of the weights, content hashes of all items' texts,
  their look-up in the store, encoding, commit.
- `embed_job_vs_forward`: items per second of a complete `embed_items` / items per second of the Item LLM alone (width
  576, 6 layers) on the same packed texts, without look-up and writing.

Texts, ids and weights are synthetic. The files need about 3.5 GB (more with Lance) in the folder for temporary files
($TMPDIR).
"""

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from bench_step import LLAMA, SMALL
from benchmarking import (
    SMOLLM2,
    alternate,
    arguments,
    keep_large_buffers,
    matmul_peak,
    medians,
    ratio,
    report,
    say,
    timed,
)
from lance_table import INSTALLED, REMEDY, LanceTable
from torch import Tensor

from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.schema import Config, FeatureConfig
from hllm_torchrec.data.token_store import TokenStore
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.inference import item_embedding
from hllm_torchrec.inference.item_embedding import embed_items
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import LiveItems
from hllm_torchrec.models.parallelize import parallelize
from hllm_torchrec.modules.encoders.item_llm import EncodingCounts
from hllm_torchrec.store import EmbeddingStore, Snapshot
from hllm_torchrec.store.segment import all_finite, sorted_index

ASKED = 4096
BLOCK = 16_384
ITEM_LLM = SMOLLM2 | {"vocab_size": 8192}
REFRESHED = LLAMA | {"num_hidden_layers": 2, "vocab_size": 8192}
"""Width 256: with a small Item LLM, the work of a refresh other than encoding is a larger share of its time."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the bench.

    rows, width: of the store; items: catalogue of `bench_refresh`; new: number of items deleted before each refresh;
    job_items: catalogue of `bench_job`; tokens: mean length of a text; repeats: timed rounds; asked: number of ids in
    one gather; upserts: number of rows in one upsert.
    """

    rows: int
    width: int
    items: int
    new: int
    job_items: int
    tokens: int
    repeats: int
    asked: int = ASKED
    upserts: int = 1000


FULL = Sizes(1_000_000, 576, 100_000, 1000, 2500, 24, 5)
QUICK = Sizes(1_000_000, 576, 100_000, 1000, 600, 16, 3)
TINY = Sizes(500, 8, 300, 5, 60, 6, 1, 16, 20)


PARTS = ("store", "refresh", "job")
LANCE_RATIOS = (("write", "write", "store_int64"), ("gather", "gather_int64", "store"), ("upsert", "upsert", "store"))
"""(name of the ratio, comparison, side of the store) of each ratio to Lance."""


# --- the store ---------------------------------------------------------------------------------------------


class Rows:
    """Vectors [n, D] fp16, their ids and content hashes (`marks`)."""

    def __init__(self, rows: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        blocks = (torch.rand(min(BLOCK, rows - at), width, generator=generator) for at in range(0, rows, BLOCK))
        self.vectors = torch.cat([block.half() for block in blocks])
        names = pa.array(np.arange(rows)).cast(pa.string())
        self.keys = {
            "string": pa.compute.binary_join_element_wise("item-", names, "").cast(pa.large_string()),
            "int64": pa.array(np.arange(rows)),
        }
        self.marks = np.arange(rows, dtype=np.uint64)

    def blocks(self) -> Iterator[slice]:
        """Slices of the rows that are written at a time."""
        return (slice(at, at + BLOCK) for at in range(0, len(self.vectors), BLOCK))

    def write_plain(self, path: Path) -> None:
        """Write only the bytes of the vectors."""
        with path.open("wb") as file:
            for block in self.blocks():
                file.write(memoryview(self.vectors[block].numpy()).cast("B"))
            file.flush()
            os.fsync(file.fileno())

    def write_store(self, path: Path, kind: Literal["string", "int64"]) -> None:
        """Write a new store in one commit."""
        store = EmbeddingStore.create(path, self.vectors.shape[1], "fp16", kind)
        with store.writer() as writer:
            for block in self.blocks():
                keys = self.keys[kind].slice(block.start, BLOCK)
                writer.upsert(keys, self.vectors[block], self.marks[block])
            writer.commit()

    def write_lance(self, path: Path) -> None:
        """Write a new Lance dataset."""
        table = LanceTable(path, self.vectors.shape[1])
        table.write(table.batch(np.arange(len(self.vectors))[at], self.vectors[at].numpy()) for at in self.blocks())


def afresh(write: Callable[[Path], None], path: Path) -> float:
    """Delete `path`, then return the seconds of `write(path)`."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()  # else the time of one side would include writing back pages of the other side
    started = time.perf_counter()
    write(path)
    return time.perf_counter() - started


def compare_writes(rows: Rows, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of writing with each method, and of parts of a commit; the last round's files are used afterwards."""
    sides = {
        "plain": lambda: afresh(rows.write_plain, folder / "plain.bin"),
        "store": lambda: afresh(lambda path: rows.write_store(path, "string"), folder / "string"),
        "store_int64": lambda: afresh(lambda path: rows.write_store(path, "int64"), folder / "int64"),
    }
    if INSTALLED:
        sides["lance"] = lambda: afresh(rows.write_lance, folder / "lance")
    return alternate(sides | {name: timed(part) for name, part in commit_parts(rows).items()}, repeats)


def commit_parts(rows: Rows) -> dict[str, Callable[[], object]]:
    """Parts of a commit other than writing the bytes of the vectors, each on one thread."""
    blocks, ids = [rows.vectors[block] for block in rows.blocks()], pa.chunked_array([rows.keys["string"]])
    return {
        "finite": lambda: all(map(all_finite, blocks)),
        "index": lambda: sorted_index(ids),
        "checksums": lambda: [zlib.crc32(memoryview(block.numpy()).cast("B")) for block in blocks],
    }


def compare_upserts(rows: Rows, folder: Path, sizes: Sizes) -> dict[str, list[float]]:
    """Seconds of replacing random rows of the store of int64 ids, and of the Lance dataset, in one commit each."""
    table, store = LanceTable(folder / "lance", sizes.width), EmbeddingStore.open(folder / "int64")
    table.index_ids()
    ids = itertools.cycle([np.random.default_rng(n).choice(sizes.rows, sizes.upserts, False) for n in range(8)])

    def ours() -> None:
        rows_now = next(ids)
        with store.writer() as writer:
            writer.upsert(pa.array(rows_now), rows.vectors[rows_now], rows.marks[rows_now])
            writer.commit()

    def lance() -> None:
        rows_now = next(ids)
        table.upsert(rows_now, rows.vectors[rows_now].numpy())

    return alternate({"store": ours, "lance": lance}, 2 * sizes.repeats)


class Gathers:
    """Look-ups of random ids: in a plain memory map and a Lance table by row number, and in a store by id."""

    def __init__(self, rows: Rows, folder: Path, kind: Literal["string", "int64"], asked: int) -> None:
        self.plain = np.memmap(folder / "plain.bin", np.float16, mode="r").reshape(rows.vectors.shape)
        self.table = LanceTable(folder / "lance", rows.vectors.shape[1])
        self.snapshot: Snapshot = EmbeddingStore.open(folder / kind).snapshot()
        rng = np.random.default_rng(1)
        drawn = [rng.integers(0, len(rows.vectors), asked) for _ in range(16)]
        self.asked = [(row, rows.keys[kind].take(pa.array(row))) for row in drawn]
        self.turn = {side: itertools.cycle(self.asked) for side in ("memmap", "store", "lance")}
        self.names = [keys.to_pylist() for _, keys in self.asked] if kind == "string" else []
        self.name = itertools.cycle(self.names)
        self.row_of = {key: row for row, key in enumerate(rows.keys["string"].to_pylist())} if self.names else {}
        for row, keys in self.asked:
            found, known = self.snapshot.gather(keys, torch.float16)
            if not (bool(known.all()) and torch.equal(found, torch.from_numpy(self.plain[row]))):
                raise AssertionError("the store's vectors are not those of the plain file")
            if self.table.path.exists() and not np.array_equal(self.table.gather(row), self.plain[row]):
                raise AssertionError("Lance's vectors are not those of the plain file")

    def lance(self) -> None:
        """Gather from Lance by known row numbers."""
        self.table.gather(next(self.turn["lance"])[0])

    def memmap(self) -> None:
        """Gather from the memory map by known row numbers."""
        self.plain[next(self.turn["memmap"])[0]]

    def by_dict(self) -> None:
        """Gather from the memory map by row numbers that a dict returns for the ids."""
        self.plain[np.array([self.row_of[name] for name in next(self.name)])]

    def store(self) -> None:
        """Gather from the store by id."""
        self.snapshot.gather(next(self.turn["store"])[1], torch.float16)


def bench_store(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Measure writes, look-ups and upserts; return ratios and seconds."""
    rows = Rows(sizes.rows, sizes.width)
    seconds = {"write": compare_writes(rows, folder, sizes.repeats)}
    for kind in ("string", "int64"):
        gathers = Gathers(rows, folder, kind, sizes.asked)  # type: ignore[arg-type]
        sides: dict[str, Callable[[], None]] = {"memmap": gathers.memmap, "store": gathers.store}
        if kind == "string":
            sides["dict"] = gathers.by_dict
        elif INSTALLED:
            sides["lance"] = gathers.lance
        seconds[f"gather_{kind}"] = alternate(sides, 20, warmup=5, seconds=0 if sizes is TINY else 2)
    if INSTALLED:
        seconds["upsert"] = compare_upserts(rows, folder, sizes)
    else:
        say(REMEDY)
    found = {name: medians(times) for name, times in seconds.items()}
    for name, of_sides in found.items():
        say(f"{name}: " + ", ".join(f"{side} {value:.4f} s" for side, value in of_sides.items()))
    lance = {
        f"store_{name}_vs_lance": ratio(seconds[key]["lance"], seconds[key][side])
        for name, key, side in LANCE_RATIOS
        if "lance" in seconds.get(key, {})
    }
    strings, write = seconds["gather_string"], seconds["write"]
    serial = [sum(round_) for round_ in zip(write["plain"], write["finite"], write["index"], strict=True)]
    return {
        "ratios": lance
        | {
            "store_write_vs_plain": ratio(write["plain"], write["store"]),
            "store_write_bound": ratio(write["plain"], serial),
            "store_gather_vs_memmap": ratio(seconds["gather_int64"]["memmap"], seconds["gather_int64"]["store"]),
            "store_gather_vs_memmap_strings": ratio(strings["memmap"], strings["store"]),
            "store_gather_vs_memmap_strings_dict": ratio(strings["dict"], strings["store"]),
        },
        "seconds": {"write": seconds["write"], **{k: v for k, v in found.items() if k != "write"}},
    }


# --- the embedding job -------------------------------------------------------------------------------------


class InventedItems:
    """Replacement for a dataset, with the attributes that the embedding job reads."""

    def __init__(self, items: int) -> None:
        self.items = pa.table({"raw_item_id": [f"item-{item}" for item in range(items)]})


def text_experiment(config: Config, tokens: TokenStore) -> Experiment:
    """Experiment on the CPU whose items are the texts of `tokens`, without a dataset."""
    device = torch.device("cpu")
    model = build_model(config, {}, 0.5, torch.device("meta"))
    encoder = ItemEncoder(tokens, device)
    assert model.item_llm is not None
    live = model.item_source = LiveItems(model.item_llm, encoder)
    dataset, wrapped = InventedItems(len(tokens) - 1), parallelize(model, config, device)
    return Experiment(config, dataset, None, device, wrapped, {"item_llm": encoder}, live, None)  # type: ignore[arg-type]


def invented(items: int, shape: dict[str, Any], tokens: int) -> Experiment:
    """Experiment with an Item LLM of `shape` and random texts of tokens // 2 to 3 * tokens // 2 tokens each."""
    config = Config(
        item_llm=ItemLLMConfig(shape=shape, tokenizer="none", max_text_length=2 * tokens),
        user=UserEncoderConfig(shape=SMALL | {"vocab_size": 8}),
        features=FeatureConfig(item_id=False, action=False, time_depth=0),
    )
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0, 0], np.cumsum(rng.integers(tokens // 2, 3 * tokens // 2 + 1, items))])
    values = rng.integers(0, shape["vocab_size"], offsets[-1], dtype=np.int32)
    facts = {"tokenizer": "none", "prompt": "", "keys": [], "separator": "", "max_text_length": 2 * tokens}
    store = TokenStore(Path("invented"), values, offsets.astype(np.int64), facts)
    torch.manual_seed(0)
    return text_experiment(config, store)


def bench_refresh(sizes: Sizes, shape: dict[str, Any], folder: Path, fulls: int) -> dict[str, Any]:
    """Seconds of embedding all items into an empty store, and of embedding the items that were deleted from it.

    fulls: number of times that all items are embedded; each is followed by three refreshes.
    """
    experiment, rng = invented(sizes.items, shape, sizes.tokens), np.random.default_rng(2)
    seconds: dict[str, list[float]] = {"full": [], "refresh": []}

    def job(side: str, expected: int) -> None:
        started = time.perf_counter()
        done = embed_items(experiment, folder / "items")
        seconds[side].append(time.perf_counter() - started)
        assert done.encoded == expected, f"{done.encoded} items instead of {expected}"
        say(f"{side}: {done.encoded} of {done.items} items, {seconds[side][-1]:.2f} s")

    for _ in range(fulls):
        shutil.rmtree(folder / "items", ignore_errors=True)
        job("full", sizes.items)
        for _ in range(3):
            store = EmbeddingStore.open(folder / "items")
            with store.writer() as writer:
                writer.delete([f"item-{item}" for item in rng.choice(sizes.items, sizes.new, replace=False)])
                writer.commit()
            job("refresh", sizes.new)
    each = [statistics.median(seconds["refresh"][at : at + 3]) for at in range(0, 3 * fulls, 3)]
    return {"ratios": {"refresh_vs_full": ratio(each, seconds["full"])}, "seconds": {"refresh": seconds}}


class Forward:
    """The Item LLM alone on the catalogue's texts, in the chunks of the job, which are packed in advance."""

    def __init__(self, experiment: Experiment) -> None:
        item_llm, encoder = experiment.hllm.item_llm, experiment.item_encoder
        assert item_llm is not None and encoder is not None
        self.item_llm, tokens = item_llm.eval(), encoder.tokens
        chunks = item_embedding.rank_chunks(np.arange(1, len(tokens)), tokens.lengths + 1)
        self.packed: list[tuple[Tensor, ...]] = [
            tuple(map(torch.from_numpy, tokens.gather(ids))) for round_ in chunks for ids in round_
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        """Encode every text once."""
        for token_ids, cu_seqlens in self.packed:
            self.item_llm(token_ids, cu_seqlens)


def bench_job(sizes: Sizes, shape: dict[str, Any], folder: Path, peak: float) -> dict[str, Any]:
    """Items per second of the job and of the model alone."""
    experiment = invented(sizes.job_items, shape, sizes.tokens)
    encoder, hllm = experiment.item_encoder, experiment.hllm
    assert encoder is not None and hllm.item_llm is not None
    forward = Forward(experiment)

    def job() -> float:
        shutil.rmtree(folder / "job", ignore_errors=True)
        started = time.perf_counter()
        done = embed_items(experiment, folder / "job")
        assert done.encoded == sizes.job_items
        return time.perf_counter() - started

    before = encoder.work
    job()
    work: EncodingCounts = encoder.work - before
    times = alternate({"forward": forward, "job": job}, max(2, sizes.repeats - 1), warmup=0)
    seconds = medians(times)
    say("embed job: " + ", ".join(f"{side} {sizes.job_items / value:.1f} items/s" for side, value in seconds.items()))
    flops = hllm.item_llm.flops(work)
    return {
        "ratios": {"embed_job_vs_forward": ratio(times["forward"], times["job"])},
        "seconds": {"job": times},
        "share": {side: flops / value / peak for side, value in seconds.items()},
        "tokens": work.tokens,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    options: argparse.Namespace = parser.parse_args(argv)
    init_distributed()
    peak = matmul_peak(seconds=0.1 if options.tiny else 1.0)
    sizes = TINY if options.tiny else QUICK if options.quick else FULL
    small = SMALL | {"vocab_size": 64}
    with tempfile.TemporaryDirectory() as folder:
        run = {
            "store": lambda: bench_store(sizes, Path(folder)),
            "refresh": lambda: bench_refresh(
                sizes, small if options.tiny else REFRESHED, Path(folder), 1 if options.quick else 3
            ),
            "job": lambda: bench_job(sizes, small if options.tiny else ITEM_LLM, Path(folder), peak),
        }
        parts = {name: run[name]() for name in reversed(PARTS) if name in options.only}
    destroy_distributed()
    found = {
        "ratios": {name: value for part in parts.values() for name, value in part["ratios"].items()},
        "shapes": {**sizes.__dict__, "block": BLOCK, "job_tokens": parts.get("job", {}).get("tokens")},
        "models": {"refresh": REFRESHED, "job": ITEM_LLM},
        "seconds": {name: value for part in parts.values() for name, value in part["seconds"].items()},
        "matmul_peak": peak,
        "matmul_share": {"embed_job": parts["job"]["share"]} if "job" in parts else None,
    }
    return report("store", options, found)


if __name__ == "__main__":
    keep_large_buffers()
    main()
