"""A dataset that cannot be written: what is computed from it goes to the cache."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hllm_torchrec.common.urls import CACHE
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.derived_files import derived_path
from hllm_torchrec.data.item_factors import item_vectors
from hllm_torchrec.data.token_store import TokenStore, build_token_store
from tests.helpers import fixtures

NOBODY = 65534


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that every user may enter, with a read-only dataset `d` and an empty cache `cache`."""
    fixtures.tokenizer_dir()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(fixtures.dataset().root, folder / "d", ignore=shutil.ignore_patterns("tokens", "vectors"))
        shutil.copytree(fixtures.tokenizer_dir(), folder / "tokenizer")
        (folder / "cache").mkdir()
        (folder / "cache").chmod(0o777)
        monkeypatch.setenv(CACHE, str(folder / "cache"))
        for path in [folder / "d", *(folder / "d").rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield folder
        for path in (folder / "d").rglob("*"):
            path.chmod(0o755)
        (folder / "d").chmod(0o755)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Context manager: root may write everywhere, so the block runs as another user."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(was)


def test_factors_and_tokens_of_a_read_only_dataset_are_cached(folder: Path) -> None:
    before = sorted(path.name for path in (folder / "d").iterdir())
    dataset = Dataset.open(folder / "d")
    # These import the libraries, too, which another user may not be allowed to read.
    expected, _ = item_vectors(fixtures.dataset(), "factors"), fixtures.token_store()
    with without_privileges():
        factors = item_vectors(dataset, "factors")
        built = build_token_store(dataset, folder / "tokenizer", keys=["title"], max_text_length=8)
        assert built.is_relative_to(folder / "cache") and len(TokenStore.open(built)) == fixtures.ITEMS + 1
        assert build_token_store(dataset, folder / "tokenizer", keys=["title"], max_text_length=8) == built
    np.testing.assert_array_equal(factors, expected)
    assert sorted(path.name for path in (folder / "d").iterdir()) == before


def test_a_file_that_is_there_is_preferred_and_no_place_at_all_is_named(folder: Path) -> None:
    dataset = Dataset.open(folder / "d")
    assert derived_path(dataset, "items.parquet") == folder / "d" / "items.parquet"
    (folder / "cache").chmod(0o555)
    with (
        without_privileges(),
        pytest.raises(ValueError, match=r"d/tokens/x: the dataset cannot be written to, .*set HLLM_CACHE to a folder"),
    ):
        derived_path(dataset, "tokens", "x")
    assert derived_path(fixtures.dataset(), "tokens", "x") == fixtures.dataset().root / "tokens" / "x"
