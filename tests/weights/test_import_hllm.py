"""The published HLLM weights, imported, give the embeddings and the ranking of the published way to compute them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.launch import import_hllm
from hllm_torchrec.weights.import_hllm import PROMPT, TextOptions, import_public, read_public, rotary_config
from tests.helpers import fixtures

WIDTH, LONGEST = 16, 10
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
TEXT = TextOptions(text_keys=("title", "brand"), max_text_length=LONGEST, max_history=20)


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@dataclass
class Published:
    """The published model, computed its way: stock transformers, one item or user at a time."""

    item: LlamaForCausalLM
    user: LlamaForCausalLM
    token: Tensor

    def state(self) -> dict[str, Tensor]:
        parts = {"item_llm": self.item, "user_llm": self.user}
        state = {f"{part}.{key}": value for part, model in parts.items() for key, value in model.state_dict().items()}
        return state | {"item_emb_tokens": self.token.view(1, 1, -1), "logit_scale": torch.tensor(20.0).log()}

    @torch.no_grad()
    def embed(self, text: str) -> Tensor:
        """[D]; positions end at the maximum length, as in the published loader."""
        tokenizer = AutoTokenizer.from_pretrained(fixtures.tokenizer_dir())
        ids = torch.tensor(tokenizer(text)["input_ids"][:LONGEST], dtype=torch.long)
        words = torch.cat([self.item.get_input_embeddings()(ids), self.token[None]])
        places = torch.arange(LONGEST - len(ids), LONGEST + 1)
        return self.item.model(inputs_embeds=words[None], position_ids=places[None]).last_hidden_state[0, -1]

    @torch.no_grad()
    def predict(self, items: Tensor) -> Tensor:
        """Items [n, D] -> the predicted next one [D]; padded on the left to the longest history."""
        padding = TEXT.max_history - items.shape[0]
        inputs = torch.cat([torch.randn(padding, WIDTH), items])
        mask = torch.arange(TEXT.max_history) >= padding
        return self.user.model(inputs_embeds=inputs[None], attention_mask=mask[None].long()).last_hidden_state[0, -1]


@cache
def published() -> Published:
    torch.manual_seed(3)
    models = [LlamaForCausalLM(LlamaConfig(**SHAPE)).eval() for _ in range(2)]
    for model in models:
        fixtures.enlarge(model)
    return Published(*models, torch.randn(WIDTH))


@cache
def bases() -> Path:
    """The directories that training began with: configs, and the tokeniser beside the Item LLM's."""
    folder = fixtures.folder() / "bases"
    for part in ("item", "user"):
        LlamaConfig(**SHAPE).save_pretrained(folder / part)
    for file in fixtures.tokenizer_dir().iterdir():
        (folder / "item" / file.name).write_bytes(file.read_bytes())
    torch.save(published().state(), folder / "pytorch_model.bin")
    return folder


def arguments(output: Path, *more: str) -> list[str]:
    base = bases()
    given = {"checkpoint": base / "pytorch_model.bin", "item-llm": base / "item", "user-llm": base / "user"}
    options = [f"--{name}={value}" for name, value in (given | {"output": output}).items()]
    return [*options, "--text-keys", "title", "brand", "--max-text-length=10", "--max-history=20", *more]


def texts(dataset: Dataset) -> list[str]:
    """The published layout: the prompt, then key: value without anything between."""
    rows = dataset.text(["title", "brand"]).to_pylist()
    return [PROMPT + "".join(f"{key}: {value}" for key, value in row.items() if value) for row in rows]


def test_embeddings_and_ranking_are_those_of_the_published_way(tmp_path: Path) -> None:
    dataset = fixtures.dataset("leave_one_out")
    assert import_hllm.main(arguments(tmp_path / "run", f"--dataset={dataset.root}")) == 0
    loaded = load_run(tmp_path / "run", "best", init_distributed())
    with loaded.weights, torch.no_grad():
        catalogue = catalogue_vectors(loaded.experiment)
        expected = torch.stack([published().embed(text) for text in texts(dataset)])
        torch.testing.assert_close(catalogue[1:], expected, rtol=1e-4, atol=1e-4)
        loader = loaded.experiment.loader("test", 8)
        loaded.experiment.model.eval()
        compared = 0
        for batch in loader.batches(0):
            predicted = loaded.experiment.model(batch, want_next=True).next_items
            for row in torch.nonzero(batch.query_visible[batch.target_query] > 0).flatten().tolist():
                query = int(batch.target_query[row])
                piece = int(torch.searchsorted(batch.query_offsets, query, right=True)) - 1
                start, seen = int(batch.seq_offsets[piece]), int(batch.query_visible[query])
                history = batch.item_ids[start : start + seen]
                own = published().predict(expected[history - 1])
                torch.testing.assert_close(predicted[row], own, rtol=1e-4, atol=1e-4)
                ours, theirs = (cosine_similarity(x[None], catalogue[1:]) for x in (predicted[row], own))
                assert bool((ours[theirs.argsort(descending=True)].diff() < 1e-4).all())  # but for ties, one order
                compared += 1
    assert compared > 10


def test_the_configuration_has_the_checkpoints_temperature_and_text(tmp_path: Path) -> None:
    assert import_hllm.main(arguments(tmp_path / "model")) == 0
    from hllm_torchrec.config.loading import config_from_file

    config = config_from_file(tmp_path / "model" / "config.yaml")
    assert config.objective.temperature == pytest.approx(1 / 20)
    assert (config.item_llm.separator, config.item_llm.text_keys) == ("", ("title", "brand"))
    assert config.data.max_history == 21  # 20 events and their target
    assert (config.objective.mask_own_items, config.objective.mask_cosine_above) == (False, 0.99)  # the published loss


def test_baichuans_packed_matrices_become_llamas(tmp_path: Path) -> None:
    state: dict[str, Tensor] = published().state()
    for part in ("item_llm", "user_llm"):
        for layer in range(SHAPE["num_hidden_layers"]):
            at = f"{part}.model.layers.{layer}.self_attn"
            packed = torch.arange(3 * WIDTH * WIDTH, dtype=torch.float).view(3 * WIDTH, WIDTH)
            for kind in "qkv":
                del state[f"{at}.{kind}_proj.weight"]
            state[f"{at}.W_pack.weight"] = packed
    torch.save(state, tmp_path / "baichuan.bin")
    facts = {**SHAPE, "model_type": "baichuan", "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    del facts["num_key_value_heads"]
    base = tmp_path / "base"
    base.mkdir()
    for file in fixtures.tokenizer_dir().iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "config.json").write_text(json.dumps(facts))
    import_public(tmp_path / "baichuan.bin", base, base, tmp_path / "out", TEXT)
    from transformers import AutoModel

    attention = AutoModel.from_pretrained(tmp_path / "out" / "item_llm").layers[0].self_attn
    for number, projection in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
        assert torch.equal(projection.weight, packed[number * WIDTH : (number + 1) * WIDTH])


def write(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


class Stranger:
    """What weights alone do not hold."""


def test_what_is_not_such_a_checkpoint_is_refused_in_a_line(tmp_path: Path) -> None:
    state = published().state()
    without = {name: value for name, value in state.items() if not name.startswith("user_llm.") and "scale" not in name}
    with pytest.raises(ValueError, match=r"a\.bin: has no logit_scale, user_llm\.\*, which checkpoints"):
        read_public(write(tmp_path / "a.bin", without))
    with pytest.raises(ValueError, match=r"b\.bin: cannot be read as weights alone"):
        read_public(write(tmp_path / "b.bin", Stranger()))
    with pytest.raises(ValueError, match=r"c\.bin: is not a mapping of names to tensors"):
        read_public(write(tmp_path / "c.bin", [1, 2]))
    with pytest.raises(ValueError, match=r"none\.bin: no such file"):
        read_public(tmp_path / "none.bin")


def test_a_config_of_another_model_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = bases()
    wide = tmp_path / "wide"
    LlamaConfig(**{**SHAPE, "intermediate_size": 40}).save_pretrained(wide)
    with pytest.raises(ValueError, match=r"user_llm: layers\.0\.mlp\.\w+\.weight is \(.*\), the config wants \("):
        import_public(base / "pytorch_model.bin", base / "item", wide, tmp_path / "out", TEXT)
    with pytest.raises(ValueError, match="has no tokenizer"):
        import_public(base / "pytorch_model.bin", base / "user", base / "user", tmp_path / "out", TEXT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide"]


def test_positions_that_are_not_rotary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fixtures.BERT))
    with pytest.raises(ValueError, match="bert has no rotary positions"):
        rotary_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "baichuan", "hidden_size": 5120}))
    with pytest.raises(ValueError, match="Baichuan2-13B has ALiBi positions"):
        rotary_config(tmp_path)


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_hllm.main(arguments(tmp_path)) == 2
    assert "already exists" in capsys.readouterr().err
    assert (
        import_hllm.main(arguments(tmp_path / "x", "--text-keys", "nope", f"--dataset={fixtures.dataset().root}")) == 2
    )
    assert "no text column nope" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
