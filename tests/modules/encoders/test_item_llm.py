"""The Item LLM against stock Hugging Face models that read one item at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.bert import BertConfig, BertForMaskedLM

from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.encoders.item_llm import ItemLLM, Pooling
from tests.helpers.fixtures import BERT, LLAMA, enlarge

SHAPES = {"llama": LLAMA, "bert": BERT}
TEXTS = [[4, 9, 1], [], [7], [2, 2, 30, 11, 5, 8, 3], [], [6, 1]]


def item_llm(kind: str, pooling: Pooling = "item", seed: int = 0) -> ItemLLM:
    torch.manual_seed(seed)
    model = ItemLLM(enlarge(build_backbone(None, SHAPES[kind])), pooling, causal=kind == "llama")
    nn.init.normal_(model.item_token)
    return model.eval()


def stock_of(model: ItemLLM, kind: str) -> Any:
    """The same backbone weights in the stock model, without our attention."""
    stock = build_backbone(None, SHAPES[kind], attention="eager").eval()
    stock.load_state_dict(model.backbone.state_dict())
    return stock


def packed(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *map(len, texts)])
    return torch.tensor([t for text in texts for t in text], dtype=torch.int32), lengths.cumsum(0)


def one_by_one(stock: Any, item_token: Tensor, texts: list[list[int]], pooling: Pooling) -> Tensor:
    """E of every item: the text's words and [ITEM] through the stock model, one item at a time."""
    embeddings = []
    for text in texts:
        words = stock.get_input_embeddings()(torch.tensor(text, dtype=torch.int64))
        with_item = torch.cat([words, item_token[None]])
        is_item = pooling == "item" or not text
        hidden = stock(inputs_embeds=(with_item if is_item else words)[None]).last_hidden_state[0]
        embeddings.append(hidden[-1] if is_item else hidden.mean(0))
    return torch.stack(embeddings)


@pytest.mark.parametrize("pooling", ["item", "mean"])
@pytest.mark.parametrize("kind", SHAPES)
def test_packed_items_equal_a_stock_model_that_reads_one_at_a_time(kind: str, pooling: Pooling) -> None:
    model = item_llm(kind, pooling)
    stock = stock_of(model, kind)
    item_token = model.item_token.detach().clone().requires_grad_()
    ours = model(*packed(TEXTS))
    theirs = one_by_one(stock, item_token, TEXTS, pooling)
    assert ours.shape == (len(TEXTS), LLAMA["hidden_size"])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(model.item_token.grad, item_token.grad, rtol=1e-3, atol=1e-3)
    mine = {name: p.grad for name, p in model.backbone.named_parameters()}
    expected = {name: p.grad for name, p in stock.named_parameters()}
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


def test_a_llama_that_was_given_plain_token_ids_agrees() -> None:
    """Mean pooling over the text alone is the stock model on its token ids, embeddings and all."""
    model = item_llm("llama", "mean")
    text = TEXTS[3]
    hidden = stock_of(model, "llama")(torch.tensor([text])).last_hidden_state[0]
    torch.testing.assert_close(model(*packed([text]))[0], hidden.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["item", "mean"])
def test_an_item_does_not_depend_on_the_others_of_its_batch(pooling: Pooling) -> None:
    model = item_llm("llama", pooling)
    alone = torch.cat([model(*packed([text])) for text in TEXTS])
    torch.testing.assert_close(model(*packed(TEXTS)), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["item", "mean"])
@pytest.mark.parametrize("kind", SHAPES)
def test_no_items_still_run_the_layers_once_and_keep_a_graph(kind: str, pooling: Pooling) -> None:
    model = item_llm(kind, pooling)
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    none = model(*packed([]))
    assert none.shape == (0, LLAMA["hidden_size"]) and calls == [1]
    none.sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    missing = {name for name, _ in model.named_parameters()} - reached
    assert all("word_embeddings" in name or "embed_tokens" in name for name in missing)
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


def test_an_item_token_starts_at_the_mean_word() -> None:
    model = ItemLLM(build_backbone(None, LLAMA))
    words = model.backbone.get_input_embeddings().weight
    torch.testing.assert_close(model.item_token, words.mean(0))


def test_a_model_on_the_meta_device_can_be_built() -> None:
    with torch.device("meta"):
        model = ItemLLM(build_backbone(None, LLAMA))
    assert all(p.is_meta for p in model.parameters())


# ------------------------------------------------------------------------------------ backbones


def saved(path: Path, shape: dict[str, Any] = LLAMA, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A checkpoint with a language modelling head, as they are published; returns the model."""
    torch.manual_seed(5)
    arguments = {k: v for k, v in shape.items() if k != "model_type"}
    model: nn.Module
    if shape["model_type"] == "llama":
        model = LlamaForCausalLM(LlamaConfig(**arguments))
    else:
        model = BertForMaskedLM(BertConfig(**arguments))
    enlarge(model).to(dtype).save_pretrained(path)  # type: ignore[operator]
    return model.eval()


def test_pretrained_weights_are_loaded_without_the_language_model_head(tmp_path: Path) -> None:
    reference = saved(tmp_path)
    model = ItemLLM(build_backbone(str(tmp_path)), "mean").eval()
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name]
    text = TEXTS[3]
    hidden = reference.model(torch.tensor([text])).last_hidden_state[0]  # type: ignore[operator]
    torch.testing.assert_close(model(*packed([text]))[0], hidden.mean(0), rtol=1e-4, atol=1e-4)


def test_weights_saved_in_bf16_become_fp32_masters_in_training_mode(tmp_path: Path) -> None:
    saved(tmp_path, dtype=torch.bfloat16)
    model = build_backbone(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(module.training for module in model.modules()), "dropout and checkpointing need it"
    assert all(p.requires_grad for p in model.parameters())


def test_n_layers_equal_a_model_whose_other_layers_were_cut_off(tmp_path: Path) -> None:
    shape = {**LLAMA, "num_hidden_layers": 3}
    whole = saved(tmp_path, shape).model
    model = ItemLLM(build_backbone(str(tmp_path), layers=2), "mean").eval()
    assert model.backbone.config.num_hidden_layers == 2
    assert not [name for name, _ in model.named_parameters() if "layers.2" in name]
    whole.layers = whole.layers[:2]  # type: ignore[union-attr, index]
    text = TEXTS[3]
    hidden = whole(torch.tensor([text]), use_cache=False).last_hidden_state[0]  # type: ignore[operator]
    torch.testing.assert_close(model(*packed([text]))[0], hidden.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_more_layers_than_there_are_or_none_are_an_error(layers: int) -> None:
    with pytest.raises(ValueError, match=f"layers: {layers}: the backbone has 2; choose 1 to that many"):
        build_backbone(None, LLAMA, layers)


def test_a_checkpoint_that_lacks_a_weight_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, e\.g\. .*layers\.1\.mlp\.up_proj\.weight"):
        build_backbone(str(tmp_path))


@pytest.mark.parametrize(("pretrained", "shape"), [(None, None), ("somewhere", LLAMA)])
def test_neither_or_both_of_weights_and_shape_are_an_error(pretrained: str | None, shape: dict | None) -> None:
    with pytest.raises(ValueError, match="a backbone needs one of them"):
        build_backbone(pretrained, shape)


def test_berts_pooler_is_dropped_whether_saved_or_not(tmp_path: Path) -> None:
    saved(tmp_path, BERT)  # a masked language model: saved without a pooler, which is no missing weight
    torch.manual_seed(0)
    AutoModel.from_config(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})).save_pretrained(
        tmp_path / "with pooler"
    )
    for model in (
        build_backbone(None, BERT),
        build_backbone(str(tmp_path)),
        build_backbone(str(tmp_path / "with pooler")),
    ):
        assert not [name for name, _ in model.named_parameters() if "pooler" in name]


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "theirs.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": auto_map}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        build_backbone(str(tmp_path))
    assert not marker.exists()


def test_a_causal_checkpoint_reads_back_through_transformers(tmp_path: Path) -> None:
    """What we load and save stays a plain Hugging Face directory."""
    saved(tmp_path)
    build_backbone(str(tmp_path)).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").model
    for mine, theirs in zip(again.parameters(), build_backbone(str(tmp_path)).parameters(), strict=True):
        assert torch.equal(mine, theirs)


# ------------------------------------------------------------------------------------ the shared prefix

PREFIX = [3, 17, 8]
BEGIN = {
    "all begin with it": [PREFIX + text for text in TEXTS],
    "some do not": [PREFIX + [4, 9], [], PREFIX, [7, 7, 1], PREFIX + [6], [5]],
    "none does": [[4], [], [9, 9]],
    "all are the prefix": [PREFIX, PREFIX],
    "one item": [PREFIX + [5]],
}


def behind_prefix(texts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `ItemLLM` gets when the prefix is shared."""
    has = [text[: len(PREFIX)] == PREFIX for text in texts]
    rests = [text[len(PREFIX) :] if begins else text for text, begins in zip(texts, has, strict=True)]
    return *packed(rests), torch.tensor(PREFIX, dtype=torch.int32), torch.tensor(has)


def gradients(model: ItemLLM, embeddings: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((embeddings * weights).sum(), parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("pooling", ["item", "mean"])
@pytest.mark.parametrize("name", BEGIN)
def test_a_shared_prefix_changes_no_embedding_and_no_gradient(name: str, pooling: Pooling) -> None:
    model, texts = item_llm("llama", pooling), BEGIN[name]
    plain, shared = model(*packed(texts)), model(*behind_prefix(texts))
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-4)
    expected, found = gradients(model, plain), gradients(model, shared)
    assert float(expected["backbone.embed_tokens.weight"].abs().sum()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_prefix_without_a_mask_stands_before_all_texts() -> None:
    model = item_llm("llama")
    token_ids, cu_seqlens, prefix, has = behind_prefix(BEGIN["all begin with it"])
    assert bool(has.all())
    torch.testing.assert_close(
        model(token_ids, cu_seqlens, prefix), model(token_ids, cu_seqlens, prefix, has), rtol=0, atol=0
    )


def test_rows_of_the_prefix_are_encoded_once() -> None:
    model, rows = item_llm("llama"), []
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    texts = BEGIN["all begin with it"]
    model(*packed(texts))
    model(*behind_prefix(texts))
    assert rows == [sum(map(len, texts)) + len(texts), len(PREFIX) + sum(map(len, TEXTS)) + len(texts)]


@pytest.mark.parametrize("pooling", ["item", "mean"])
def test_no_items_behind_a_prefix_still_run_the_layers_once(pooling: Pooling) -> None:
    model = item_llm("llama", pooling)
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    none = model(*behind_prefix([]))
    assert none.shape == (0, LLAMA["hidden_size"]) and calls == [1]
    none.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "embed_tokens" not in name)


def test_an_encoder_refuses_a_shared_prefix() -> None:
    with pytest.raises(ValueError, match="^causal: False: a shared prefix of 3 tokens needs a causal Item LLM"):
        item_llm("bert")(*behind_prefix(BEGIN["some do not"]))


@pytest.mark.parametrize("pooling", ["item", "mean"])
def test_a_sliding_window_counts_the_prefix(pooling: Pooling) -> None:
    shape = {**LLAMA, "model_type": "mistral", "sliding_window": 4}
    model = ItemLLM(enlarge(build_backbone(None, shape)), pooling).eval()
    stock = build_backbone(None, shape, attention="eager").eval()
    stock.load_state_dict(model.backbone.state_dict())
    texts = [[*PREFIX, *text] for text in TEXTS]  # with [ITEM] up to eleven tokens, of which a row sees four
    expected = one_by_one(stock, model.item_token, texts, pooling)
    torch.testing.assert_close(model(*behind_prefix(texts)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(*packed(texts)), expected, rtol=1e-4, atol=1e-4)


def test_frozen_words_get_no_gradient_behind_a_prefix() -> None:
    model = item_llm("llama", "mean")
    model.backbone.get_input_embeddings().requires_grad_(False)
    model(*behind_prefix(BEGIN["some do not"])).sum().backward()
    assert model.backbone.get_input_embeddings().weight.grad is None
    assert model.backbone.layers[0].self_attn.k_proj.weight.grad is not None
