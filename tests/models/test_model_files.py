"""Damaged and foreign Hugging Face directories: one line each, with the file, the rule and a remedy."""

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hllm_torchrec.data.token_store import read_tokenizer
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.models.model_files import ITEM_TOKEN_FILE, trained_item_token
from tests.helpers.fixtures import LLAMA, folder, tokenizer_dir

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@cache
def whole() -> Path:
    """A small Llama with tokenizer and [ITEM] vector."""
    path = folder() / "whole-model"
    AutoModel.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(path)
    shutil.copytree(tokenizer_dir(), path, dirs_exist_ok=True)
    save_file({"item_token": torch.zeros(LLAMA["hidden_size"])}, path / ITEM_TOKEN_FILE)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(whole(), tmp_path / "model")


def read(path: Path) -> None:
    """Everything that a run reads of a directory."""
    trained_item_token(str(path), build_backbone(str(path)).config.hidden_size)
    read_tokenizer(path)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shards(model: Path, file: str) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(weights, model / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def as_bin(model: Path, name: str = "pytorch_model.bin") -> None:
    torch.save(load_file(model / "model.safetensors"), model / name)
    (model / "model.safetensors").unlink()


def rename_weights(model: Path, change: Callable[[str], str]) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({change(name): value for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})


def change_weights(model: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(model / "model.safetensors")
    weights = {name: change(name, value) for name, value in weights.items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut weights": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-100]),
        r"model/model\.safetensors: .*: fetch it again",
    ),
    "empty weights": (lambda m: (m / "model.safetensors").write_bytes(b""), r"model\.safetensors: .*fetch it again"),
    "a pointer": (
        lambda m: (m / "model.safetensors").write_bytes(POINTER),
        r"model\.safetensors: a pointer of git-lfs",
    ),
    "a pointer as config": (lambda m: (m / "config.json").write_bytes(POINTER), r"config\.json: a pointer of git-lfs"),
    "weights of another size": (
        lambda m: edit(m / "config.json", intermediate_size=48),
        r"config\.json wants \(24, 48\) for the weight layers\.0\.mlp\.down_proj.weight, and the file has \(24, 40\)",
    ),
    "more layers than weights": (
        lambda m: edit(m / "config.json", num_hidden_layers=3),
        r"model: 9 weights are missing, e\.g\. layers\.2",
    ),
    "layers without end": (
        lambda m: edit(m / "config.json", num_hidden_layers=10**7),
        r"config\.json: num_hidden_layers is 10000000, it must be a number from 1 to 1000; fetch",
    ),
    "no layers": (lambda m: edit(m / "config.json", num_hidden_layers=0), r"config\.json: num_hidden_layers is 0"),
    "no heads": (lambda m: edit(m / "config.json", num_attention_heads=0), r"config\.json: "),
    "text for a number": (lambda m: edit(m / "config.json", hidden_size="24"), r"config\.json: "),
    "another kind": (lambda m: edit(m / "config.json", model_type="lama"), r"config\.json: "),
    "no kind": (lambda m: (m / "config.json").write_text("{}"), r"config\.json: "),
    "a list": (lambda m: (m / "config.json").write_text("[]"), r"config\.json: not a JSON object; fetch"),
    "no JSON": (lambda m: (m / "config.json").write_text("{"), r"config\.json: JSONDecodeError: .*; fetch"),
    "several parts": (
        lambda m: (m / "config.json").write_text(json.dumps({"model_type": "gemma3"})),
        r"config\.json: gemma3 has several parts \(text_config, vision_config\); save its text model alone",
    ),
    "no config": (lambda m: (m / "config.json").unlink(), r"config\.json: FileNotFoundError: "),
    "weights outside": (
        lambda m: shards(m, "../part.safetensors"),
        r"index\.json: names '\.\./part\.safetensors', it must be a safetensors file in the same directory",
    ),
    "a shard that is not there": (
        lambda m: shards(m, "gone.safetensors"),
        r"gone\.safetensors: no such file, though the index names it; ",
    ),
    "a wrapped model": (
        lambda m: rename_weights(m, lambda name: f"module.{name}"),
        r"20 weights are missing, e\.g\. .*: the file's names begin with 'module\.', as of a wrapped model; write",
    ),
    "an adapter": (
        lambda m: (m / "adapter_config.json").write_text("{}"),
        r"model: has a LoRA adapter \(adapter_config\.json\), which is not read: merge it",
    ),
    "an adapter alone": (
        lambda m: (m / "config.json").rename(m / "adapter_config.json"),
        r"model: has a LoRA adapter",
    ),
    "a quantized model": (
        lambda m: edit(m / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"model: .*it is quantized \(quantization_config\): use the model from which it was made",
    ),
    "a weight that is NaN": (
        lambda m: change_weights(m, lambda name, value: value * (float("nan") if name == "norm.weight" else 1)),
        r"model: the weight norm\.weight has values that are not finite; fetch the directory again",
    ),
    "a pickle alone": (
        as_bin,
        r"model: no model\.safetensors \(only pytorch_model\.bin\): .*convert them .*save_pretrained",
    ),
    "GGUF alone": (
        lambda m: as_bin(m, "model-q4.gguf"),
        r"model: no model\.safetensors \(only model-q4\.gguf\): .*gguf_file=NAME\)\.save_pretrained",
    ),
    "a pointer as tokenizer": (lambda m: (m / "tokenizer.json").write_bytes(POINTER), r"tokenizer\.json"),
    "a tokenizer of another kind": (
        lambda m: (m / "tokenizer.json").write_text('{"model": {"type": "Telepathy"}}'),
        r"model: its tokenizer .*; fetch the directory again",
    ),
    "a tokenizer that multiplies texts": (
        lambda m: edit(
            m / "tokenizer.json",
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}] * 40,
            },
        ),
        r"model: its tokenizer .*: its normalizer can make a text more than 1000 times as long; fetch",
    ),
    "no [ITEM]": (
        lambda m: save_file({"other": torch.zeros(2)}, m / ITEM_TOKEN_FILE),
        r"item_token\.safetensors: .*; export or import the model again",
    ),
    "[ITEM] of another width": (
        lambda m: save_file({"item_token": torch.zeros(2)}, m / ITEM_TOKEN_FILE),
        r"item_token\.safetensors: item_token has shape \(2,\), the model is 24 wide; export",
    ),
}


def test_a_whole_directory_is_read(model: Path) -> None:
    read(model)
    shards(model, "part.safetensors")
    read(model)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused_in_one_line(damage: str, model: Path) -> None:
    harm, message = DAMAGES[damage]
    harm(model)
    with pytest.raises(ValueError, match=message) as refused:
        read(model)
    assert "\n" not in str(refused.value) and str(model) in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", ITEM_TOKEN_FILE])
def test_changed_bytes_are_read_or_refused_with_the_directorys_name(name: str, model: Path) -> None:
    rng, original = random.Random(name), (model / name).read_bytes()
    for _ in range(25):
        data = bytearray(original)
        start = rng.randrange(min(len(data), 2000))
        data[start : start + rng.choice((1, 1, 4, 40))] = rng.randbytes(rng.choice((0, 1, 4)))
        (model / name).write_bytes(data)
        try:
            read(model)
        except ValueError as error:
            assert str(model) in str(error), error
            assert "\n" not in str(error)


def test_an_error_of_the_machine_is_no_damage(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        while True:
            try:
                opened.append((model / "config.json").open())
            except OSError:
                break
        with pytest.raises(OSError, match="Too many open files") as error:
            build_backbone(str(model))
        assert "fetch" not in str(error.value)
    finally:
        for file in opened:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_weights_that_the_config_does_not_provide_for_are_said(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(model / "model.safetensors")
    others = {"lm_head.weight": 1, "layers.7.mlp.up_proj.weight": 1, "layers.0.self_attn.rotary_emb.inv_freq": 1}
    whole = weights | {name: torch.ones(1) for name in others}
    save_file(whole, model / "model.safetensors", {"format": "pt"})
    build_backbone(str(model))
    assert not caplog.records  # a head, a layer beyond the config's number and a constant
    save_file(
        weights | {"layers.0.self_attn.q_proj.bias": torch.ones(1)}, model / "model.safetensors", {"format": "pt"}
    )
    build_backbone(str(model))
    assert "1 weights are not used, e.g. layers.0.self_attn.q_proj.bias: config.json describes" in caplog.text
