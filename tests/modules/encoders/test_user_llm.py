"""The User LLM against a stock Hugging Face decoder that reads one user at a time."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.encoders.base import Queries
from hllm_torchrec.modules.encoders.user_llm import UserLLM
from tests.helpers.fixtures import USER, enlarge

WIDTH = USER["hidden_size"]
LENGTHS, VISIBLE = [4, 0, 7], [[4, 1, 1], [0], [3]]


def user_llm(pretrained: Path | None = None, dropout: float = 0.0) -> UserLLM:
    torch.manual_seed(0)
    name, shape = (str(pretrained), None) if pretrained else (None, USER)
    model = UserLLM(build_backbone(name, shape, word_embeddings=False), dropout)
    if pretrained is None:
        enlarge(model)
    return model.eval()


def batch() -> tuple[Tensor, Tensor, Queries]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(LENGTHS), WIDTH, generator=generator).requires_grad_()
    queries = Queries(
        torch.randn(5, WIDTH, generator=generator).requires_grad_(),
        torch.tensor([0, 3, 4, 5]),
        torch.tensor([v for row in VISIBLE for v in row]),
        torch.zeros(5, dtype=torch.int64),
    )
    return x, torch.tensor([0, 4, 4, 11]), queries


def one_by_one(stock: nn.Module, x_TD: Tensor, x_QD: Tensor) -> tuple[Tensor, Tensor]:
    users, h, q, number = x_TD.split(LENGTHS), [], [], 0
    for user, visible in zip(users, VISIBLE):
        if len(user):
            h.append(stock(inputs_embeds=user[None]).last_hidden_state[0])
        for seen in visible:
            row = torch.cat([user[:seen], x_QD[number : number + 1]])
            q.append(stock(inputs_embeds=row[None]).last_hidden_state[0, -1])
            number += 1
    return torch.cat(h), torch.stack(q)


def test_packed_users_equal_a_stock_decoder_that_reads_one_at_a_time() -> None:
    model = user_llm()
    stock = build_backbone(None, USER, word_embeddings=False, attention="eager").eval()
    stock.load_state_dict(model.backbone.state_dict())
    x, offsets, queries = batch()
    ours, theirs = model(x, offsets, None, queries), one_by_one(stock, x, queries.x_QD)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(y.shape, generator=generator) for y in theirs]
    gradients = []
    for outputs, module in ((ours, model), (theirs, stock)):
        loss = torch.stack([(y * w).sum() for y, w in zip(outputs, weights)]).sum()
        gradients.append(torch.autograd.grad(loss, [x, queries.x_QD, *module.parameters()]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3)


def test_pretrained_layers_are_loaded_without_words_or_head(tmp_path: Path) -> None:
    torch.manual_seed(3)
    arguments = {k: v for k, v in USER.items() if k != "model_type"}
    reference = LlamaForCausalLM(LlamaConfig(**arguments)).eval()
    enlarge(reference).save_pretrained(tmp_path)  # type: ignore[operator]
    model = user_llm(tmp_path)
    names = [name for name, _ in model.named_parameters()]
    assert names and not [name for name in names if "embed_tokens" in name or "lm_head" in name]
    x, offsets, queries = batch()
    theirs = one_by_one(reference.model, x, queries.x_QD)
    torch.testing.assert_close(model(x, offsets, None, queries), theirs, rtol=1e-4, atol=1e-4)


def test_a_model_from_scratch_has_no_word_embeddings() -> None:
    assert not [name for name, _ in user_llm().named_parameters() if "embed" in name]


def test_without_queries_the_history_is_the_same_and_no_query_comes_back() -> None:
    model = user_llm()
    x, offsets, queries = batch()
    h, q = model(x, offsets)
    assert q.shape == (0, WIDTH)
    torch.testing.assert_close(h, model(x, offsets, None, queries)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asks", [True, False])
def test_no_users_still_run_the_layers_and_keep_a_graph_to_weights_and_inputs(asks: bool) -> None:
    """Other ranks wait for this one in the backward pass of layers (FSDP) and tables (all-to-all)."""
    model = user_llm()
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    x, x_QD = (torch.empty(0, WIDTH, requires_grad=True) for _ in range(2))
    none = torch.empty(0, dtype=torch.int64)
    offsets = torch.zeros(1, dtype=torch.int64)
    h, q = model(x, offsets, None, Queries(x_QD, offsets, none, none) if asks else None)
    assert h.shape == q.shape == (0, WIDTH) and calls == [1]
    (h.sum() * 0.0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert x.grad is not None
    (q.sum() * 0.0).backward()
    assert x_QD.grad is not None or not asks


def test_users_without_history_see_their_own_query_alone() -> None:
    model = user_llm()
    x_QD = batch()[2].x_QD[:2]
    offsets = torch.zeros(3, dtype=torch.int64)
    queries = Queries(x_QD, torch.tensor([0, 1, 2]), torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    h, q = model(torch.empty(0, WIDTH), offsets, None, queries)
    assert h.shape == (0, WIDTH)
    alone = model(x_QD, torch.tensor([0, 1, 2]))[0]
    torch.testing.assert_close(q, alone, rtol=1e-5, atol=1e-5)


def test_dropout_of_the_inputs_acts_in_training_alone() -> None:
    model = user_llm(dropout=0.5)
    x, offsets, _ = batch()
    assert torch.equal(model(x, offsets)[0], model(x, offsets)[0])
    model.train()
    assert not torch.equal(model(x, offsets)[0], model(x, offsets)[0])
