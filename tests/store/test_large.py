"""10^8 vectors x 2,048 by arithmetic: the reader on files of their true sizes, which are holes but for a few rows."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from hllm_torchrec.store import EmbeddingStore
from hllm_torchrec.store.files import Manifest, SegmentFacts, write_manifest
from hllm_torchrec.store.segment import FILE_BYTES, rows_per_file

ROWS, WIDTH = 100_000_000, 2048
PER_FILE = 1_048_576
ASKED = [0, 1, PER_FILE - 1, PER_FILE, 50_000_000, 95 * PER_FILE, ROWS - 1]


def hole(path: Path, size: int) -> tuple[int, int]:
    """A file of `size` bytes that takes no room; what a manifest says of it."""
    with path.open("wb") as file:
        file.truncate(size)
    return size, 0


def column(path: Path, dtype: type, values: dict[int, int]) -> tuple[int, int]:
    """A .npy file of ROWS numbers, zeros but for some."""
    array = np.lib.format.open_memmap(path, "w+", dtype, (ROWS,))
    for row, value in values.items():
        array[row] = value
    array.flush()
    return path.stat().st_size, 0


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    """Ids 7 .. 10^8 + 6, of which ASKED have a vector that begins with their row's number."""
    made = EmbeddingStore.create(tmp_path / "s", WIDTH, "fp16", "int64")
    folder = tmp_path / "s" / "runs" / "big"
    folder.mkdir()
    files = {
        "hashes.npy": column(folder / "hashes.npy", np.uint64, {row: row + 7 for row in ASKED}),
        "rows.npy": column(folder / "rows.npy", np.int64, {row: row for row in ASKED}),
        "marks.npy": column(folder / "marks.npy", np.uint64, {row: row + 1 for row in ASKED}),
    }
    with pa.OSFile(str(folder / "keys.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema({"key": pa.int64()})):
        pass
    files["keys.arrow"] = ((folder / "keys.arrow").stat().st_size, 0)
    for number in range(-(-ROWS // PER_FILE)):
        rows = min(PER_FILE, ROWS - number * PER_FILE)
        name = f"vectors-{number:04d}.bin"
        files[name] = hole(folder / name, rows * WIDTH * 2)
    for row in ASKED:
        with (folder / f"vectors-{row // PER_FILE:04d}.bin").open("r+b") as file:
            file.seek(row % PER_FILE * WIDTH * 2)
            file.write(np.array([row % 1000, 1], np.float16).tobytes())
    write_manifest(tmp_path / "s", Manifest(1, ROWS, (SegmentFacts("big", ROWS, 0, files),)))
    return made


def test_the_reader_finds_rows_of_a_hundred_million_in_96_files(store: EmbeddingStore) -> None:
    folder = store.root / "runs" / "big"
    sizes = [file.stat() for file in folder.glob("vectors-*.bin")]
    assert len(sizes) == 96 and sum(size.st_size for size in sizes) == ROWS * WIDTH * 2 == 409_600_000_000
    assert sum(size.st_blocks for size in sizes) * 512 < 10_000_000, "the files are holes"
    snapshot = store.snapshot()
    order = [5, 0, 3, 6, 1, 4, 2]
    keys = np.array([ASKED[i] + 7 for i in order] + [6, ROWS + 7])
    found, known = snapshot.gather(keys)
    assert known.tolist() == [True] * 7 + [False] * 2
    assert found[:7, 0].tolist() == [ASKED[i] % 1000 for i in order] and found[:7, 1].tolist() == [1] * 7
    assert not found[7:].any() and not found[:, 2:].any()
    assert snapshot.content_hashes(keys)[0].tolist() == [ASKED[i] + 1 for i in order] + [0, 0]


def test_a_file_takes_four_gibibytes_or_one_row() -> None:
    assert rows_per_file(WIDTH, "fp16", FILE_BYTES) == PER_FILE and PER_FILE * WIDTH * 2 == 2**32
    assert rows_per_file(576, "fp16", FILE_BYTES) == 3_728_270
    assert rows_per_file(2**32, "fp32", FILE_BYTES) == 1


def test_files_beyond_the_ten_thousandth_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hllm_torchrec.store import store as store_module

    monkeypatch.setattr(store_module, "FILE_BYTES", 4)
    made = EmbeddingStore.create(tmp_path / "s", 1, "fp32", "int64")
    with made.writer() as writer:
        writer.upsert(np.arange(12), torch.arange(12.0)[:, None])
        writer.commit()
    (folder,) = (tmp_path / "s" / "runs").iterdir()
    raw = json.loads((tmp_path / "s" / "manifest.json").read_text())
    files = raw["runs"][0]["files"]
    for number in range(12):  # as if they were the files 9994 to 10005
        old, new = f"vectors-{number:04d}.bin", f"vectors-{number + 9994:04d}.bin"
        (folder / old).rename(folder / new)
        files[new] = files.pop(old)
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(raw))
    assert made.snapshot().gather(np.arange(12))[0][:, 0].tolist() == list(range(12))
