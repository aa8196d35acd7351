"""`CreativeLLM` against the same model of transformers on one text at a time: values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.models.backbones import backbone_config, build_backbone
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM, PackedTexts
from hllm_torchrec.modules.creative.soft_prompt import SoftPrompt
from hllm_torchrec.modules.losses.objectives import mean_cosine
from hllm_torchrec.modules.losses.token_nll import token_nll
from tests.helpers import fixtures

QWEN = {**fixtures.LLAMA, "model_type": "qwen3", "head_dim": 6}


def reference(shape: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return fixtures.enlarge(AutoModelForCausalLM.from_config(backbone_config(None, shape)), 4.0).eval()


def packed(shape: dict[str, Any], of: Any) -> CreativeLLM:
    """Return a `CreativeLLM` with the weights of a causal language model of transformers."""
    backbone = build_backbone(None, shape)
    backbone.load_state_dict(of.model.state_dict())
    if of.config.tie_word_embeddings:
        return CreativeLLM(backbone).eval()
    head = nn.Linear(shape["hidden_size"], shape["vocab_size"], bias=False)
    head.load_state_dict(of.lm_head.state_dict())
    return CreativeLLM(backbone, head).eval()


def texts(prefix: int, at_end: bool, lengths: tuple[int, ...] = (7, 4, 9, 5)) -> PackedTexts:
    """Make random texts of at least three tokens, of which the last one to four are the response."""
    random = torch.Generator().manual_seed(1)
    count = torch.tensor(lengths)
    response_from = count - 1 - torch.arange(len(lengths)) % 3
    soft_at = response_from if at_end else torch.zeros_like(count)
    return PackedTexts(
        token_ids=torch.randint(32, (int(count.sum()),), generator=random),
        cu_seqlens=torch.tensor([0, *count.cumsum(0).tolist()]),
        soft_at=soft_at,
        response_from=response_from,
        prefix_ids=torch.randint(32, (prefix,), generator=random),
    )


def one_by_one(model: Any, of: PackedTexts, soft: Tensor) -> Tensor:
    """Compute the losses as published, with a correct mask: a causal model on each text, labels on the response."""
    losses = []
    for n, tokens in enumerate(of.token_ids.split(of.cu_seqlens.diff().tolist())):
        at, begins, prefix = int(of.soft_at[n]), int(of.response_from[n]), of.prefix_ids.numel()
        words = model.get_input_embeddings()(torch.cat([of.prefix_ids, tokens]))
        embedded = torch.cat([words[: prefix + at], soft[n], words[prefix + at :]])
        labels = torch.full((embedded.shape[0],), -100)
        labels[prefix + begins + soft.shape[1] :] = tokens[begins:]
        mean = model(inputs_embeds=embedded[None], labels=labels[None]).loss
        losses.append(mean * (tokens.numel() - begins))
    return torch.stack(losses)


@pytest.mark.parametrize("shape", [fixtures.LLAMA, QWEN], ids=["llama", "qwen3"])
@pytest.mark.parametrize(("prefix", "at_end", "soft_tokens", "tied"), [(0, False, 1, True), (5, True, 3, False)])
def test_packed_equals_transformers_one_by_one(
    shape: dict[str, Any], prefix: int, at_end: bool, soft_tokens: int, tied: bool
) -> None:
    model = reference({**shape, "tie_word_embeddings": tied})
    own, of = packed(shape, model), texts(prefix, at_end)
    soft = torch.randn(4, soft_tokens, 24, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([1.0, 0.5, 2.0, 1.5])
    softs = [soft.clone().requires_grad_() for _ in range(2)]
    expected, found = one_by_one(model, of, softs[0]), own(of, softs[1])
    torch.testing.assert_close(found.nll, expected, rtol=1e-4, atol=1e-4)
    assert found.tokens.tolist() == of.response_tokens.tolist()
    (expected * weights).sum().backward()
    (found.nll * weights).sum().backward()
    torch.testing.assert_close(softs[1].grad, softs[0].grad, rtol=1e-4, atol=1e-4)
    theirs = dict(model.named_parameters())
    for name, parameter in own.named_parameters():
        other = theirs[name.replace("backbone.", "model.", 1) if name.startswith("backbone.") else "lm_head.weight"]
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_creative_reads_neither_others_nor_what_follows() -> None:
    """A text does not affect other texts, and a token only affects later positions of its text."""
    model = reference(fixtures.LLAMA)
    own, of = packed(fixtures.LLAMA, model), texts(3, False)
    soft = torch.randn(4, 1, 24)
    before = own(of, soft).nll
    changed = of.token_ids.clone()
    changed[of.cu_seqlens[1]] += 1  # the first token of text 1
    moved = (own(PackedTexts(changed % 32, *list(vars(of).values())[1:]), soft).nll - before).abs() > 1e-6
    assert moved.tolist() == [False, True, False, False]
    another = soft.clone()
    another[2] += 1
    assert ((own(of, another).nll - before).abs() > 1e-6).tolist() == [False, False, True, False]
    # Without its last response token a text's loss falls by that token's: the tokens before it do not see it.
    last = of.token_ids[: of.cu_seqlens[3]], of.cu_seqlens[:4] - torch.tensor([0, 0, 0, 1])
    shorter = PackedTexts(last[0][:-1], last[1], of.soft_at[:3], of.response_from[:3], of.prefix_ids)
    whole, short = own(of, soft).nll[2].detach(), own(shorter, soft[:3]).nll[2].detach()
    assert 0 < float(short) < float(whole)


def test_no_creatives_give_zero_gradients_to_every_weight() -> None:
    own = packed(fixtures.LLAMA, reference(fixtures.LLAMA))
    soft_prompt = SoftPrompt(16, own.width, 1, scale=own.word_scale)
    none = texts(2, False, ())
    soft = soft_prompt(torch.zeros(0, 16), torch.zeros(0, dtype=torch.bool))
    own(none, soft).nll.sum().backward()
    for name, parameter in [*own.named_parameters(), *soft_prompt.named_parameters()]:
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("equal", [False, True])
def test_chunked_losses_equal_whole_ones(equal: bool) -> None:
    """With rows of different and of equal weights, and in a second backward pass."""
    random = torch.Generator().manual_seed(3)
    inputs = [torch.randn(11, 6, generator=random, dtype=torch.float64), torch.randn(17, 6, dtype=torch.float64)]
    targets, weights = torch.randint(17, (11,), generator=random), torch.rand(11, dtype=torch.float64)
    weights = weights[:1].expand(11) if equal else weights
    hidden, head = (x.clone().requires_grad_() for x in inputs)
    expected = nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    (expected * weights).sum().backward()
    for size in (1, 4, 11, 100):
        other = [x.clone().requires_grad_() for x in inputs]
        found = token_nll(*other, targets, chunk_size=size)
        torch.testing.assert_close(found, expected)
        loss = (found * weights).sum()
        for passes in (1, 2):
            loss.backward(retain_graph=True)
            torch.testing.assert_close(other[0].grad, passes * hidden.grad)
            torch.testing.assert_close(other[1].grad, passes * head.grad)
    with pytest.raises(ValueError, match="chunk size of the token loss is 0: must be at least 1"):
        token_nll(hidden, head, targets, 0)


def test_soft_tokens_are_of_the_size_of_words_and_null_reads_no_user() -> None:
    soft = SoftPrompt(16, 24, tokens=2, hidden=8, scale=0.25)
    users = torch.randn(3, 16) * 100
    found = soft(users, torch.tensor([False, True, False]))
    assert found.shape == (3, 2, 24)
    torch.testing.assert_close(found[0].square().mean(-1).sqrt(), torch.full((2,), 0.25))
    found.sum().backward()
    torch.testing.assert_close(soft(users * 2, torch.ones(3, dtype=torch.bool)), soft.null.expand(3, 2, 24))
    published = SoftPrompt(16, 24)
    torch.testing.assert_close(published(users, torch.zeros(3, dtype=torch.bool))[:, 0], published.project(users))


@pytest.mark.parametrize("normalize", ["standardize", "whiten"])
def test_normalized_users_differ_where_they_were_nearly_parallel_and_a_center_is_the_center(normalize: str) -> None:
    torch.manual_seed(0)
    users, known = 5.0 + 0.1 * torch.randn(200, 6), torch.zeros(200, dtype=torch.bool)
    published = SoftPrompt(6, 24, scale=0.25)(users, known)[:, 0].detach()
    assert float(mean_cosine(published)) > 0.99
    soft = SoftPrompt(6, 24, scale=0.25, normalize=normalize)
    assert soft.normalize is not None and not soft.normalize.measured
    soft.normalize.measure(users)
    found = soft(users, known).detach()
    special = found - soft.null.detach()
    assert abs(float(mean_cosine(special[:, 0]))) < 0.1
    assert float(special.square().mean().sqrt()) == pytest.approx(0.25, rel=0.3)
    center = soft(users[:4].mean(0, keepdim=True), known[:1])
    torch.testing.assert_close(center[0], found[:4].mean(0))
    torch.testing.assert_close(soft(users, ~known), soft.null.expand(200, 1, 24))


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^pretrained: bert is no decoder that can be packed"):
        CreativeLLM(build_backbone(None, fixtures.BERT))
