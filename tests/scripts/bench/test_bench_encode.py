"""bench_encode: all sides give the same vectors, and the JSON has a ratio for each."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from tests.helpers import fixtures
from tests.helpers.scripts import bench_module, tiny_result

bench_encode = bench_module("bench_encode")


def saved_model(path: Path, kind: str) -> Path:
    """A small model with the tests' tokenizer, in a Hugging Face directory."""
    torch.manual_seed(0)
    shape = bench_encode.SMALL | {"model_type": kind, "vocab_size": len(AutoTokenizer.from_pretrained(tokenizer()))}
    fixtures.enlarge(model := AutoModel.from_config(AutoConfig.for_model(**shape)))
    model.save_pretrained(path)
    for file in tokenizer().iterdir():
        shutil.copy(file, path)
    return path


def tokenizer() -> Path:
    return Path(fixtures.tokenizer_dir())


@pytest.mark.slow
def test_bench_encode_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {kind: saved_model(tmp_path / kind, kind) for kind in ("bert", "llama")}
    out = tmp_path / "encode.json"
    given = ["--minilm", str(folders["bert"]), "--smollm2", str(folders["llama"]), "--texts", "5"]
    bench_encode.main(["--tiny", "--out", str(out), *given])
    result = tiny_result("encode", out, capsys.readouterr().out)
    assert {"encode_minilm_fp32", "encode_smollm2_fp32_vs_transformers"} <= set(result["ratios"])
    assert min(result["ratios"].values()) > 0
    assert 5 * 10 <= result["shapes"]["minilm_fp32"]["tokens"] <= 5 * 256


def test_other_vectors_stop_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bench_encode.Model("minilm", saved_model(tmp_path / "bert", "bert"), "mean", None, 4)
    monkeypatch.setattr(bench_encode.Transformers, "__call__", lambda self: torch.randn(4, 32))
    bench_encode.init_distributed()
    try:
        with pytest.raises(AssertionError, match="the least cosine of ours and transformers is"):
            bench_encode.compare(model, "fp32", 1, tmp_path)
    finally:
        bench_encode.destroy_distributed()
