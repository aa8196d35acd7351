"""Decoding against `generate` of transformers, with and without a shared prefix."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hllm_torchrec.modules.creative.decode import DecodeOptions, decode
from tests.helpers import fixtures
from tests.modules.creative.test_creative_llm import QWEN, packed, reference

STOP = 7


def inputs(before: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    tokens = torch.randint(32, (before + 3,), generator=random)
    return tokens[:before], tokens[before:], torch.randn(6, 2, 24, generator=random)


def whole_prompts(model: Any, before: torch.Tensor, after: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    words = model.get_input_embeddings()
    parts = (words(before).expand(len(soft), -1, -1), soft, words(after).expand(len(soft), -1, -1))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("shape", [fixtures.LLAMA, QWEN], ids=["llama", "qwen3"])
@pytest.mark.parametrize("before", [0, 5])
def test_greedy_decoding_equals_transformers_of_whole_prompts(shape: dict[str, Any], before: int) -> None:
    model = reference({**shape, "tie_word_embeddings": False})
    own, given = packed(shape, model), inputs(before)
    options = DecodeOptions(STOP, 8)
    found = decode(own, *given, options)
    with torch.no_grad():
        theirs = model.generate(
            inputs_embeds=whole_prompts(model, *given),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=STOP,
            pad_token_id=STOP,
        )
    expected = torch.where((theirs == STOP).cumsum(1) > 0, -1, theirs)
    assert torch.equal(found.tokens, expected[:, : found.tokens.shape[1]])
    assert torch.equal(found.stopped, (theirs == STOP).any(1))
    # Alone, and with the log-probability of the packed model.
    for n in range(6):
        alone = decode(own, given[0], given[1], given[2][n : n + 1], options)
        length = int((alone.tokens >= 0).sum())
        assert torch.equal(alone.tokens[0][:length], found.tokens[n][:length])
        torch.testing.assert_close(alone.log_prob[0], found.log_prob[n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("item_of", [[2, 0, 0, 1, 2, 1], [0, 0, 1, 0, 0, 2], [0, 0, 0, 1, 0, 0]])
def test_users_of_several_items_are_decoded_as_those_of_each_item_alone(item_of: list[int]) -> None:
    """In a group of equal sizes, padded, and with a copy of the prefix for each user."""
    own, (before, after, soft) = packed(fixtures.LLAMA, reference(fixtures.LLAMA)), inputs(5)
    befores, afters = torch.stack([before, before.flip(0), after.repeat(2)[:5]]), torch.stack([after, after + 1, after])
    items = torch.tensor(item_of)
    for some, texts in ((slice(None), befores), (slice(0, 0), befores[:, :0])):  # without anything before {user}, too
        found = decode(own, texts, afters, soft, DecodeOptions(STOP, 6), item_of=items)
        for item in set(item_of):
            alone = decode(own, befores[item][some], afters[item], soft[items == item], DecodeOptions(STOP, 6))
            length = alone.tokens.shape[1]
            assert torch.equal(alone.tokens, found.tokens[items == item][:, :length])
            torch.testing.assert_close(alone.log_prob, found.log_prob[items == item], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("before", [0, 5])
def test_prompts_of_several_lengths_are_decoded_as_each_alone(before: int) -> None:
    own, (first, _, soft) = packed(fixtures.LLAMA, reference(fixtures.LLAMA)), inputs(before)
    lengths, options = torch.tensor([4, 1, 7, 3, 7, 2]), DecodeOptions(-5, 6)
    after = torch.randint(32, (6, 7), generator=torch.Generator().manual_seed(6))
    of = torch.arange(6)
    found = decode(own, first.expand(6, -1), after, soft, options, item_of=of, after_lengths=lengths)
    for n, length in enumerate(lengths.tolist()):
        alone = decode(own, first, after[n, :length], soft[n : n + 1], options)
        assert torch.equal(alone.tokens[0], found.tokens[n])
        torch.testing.assert_close(alone.log_prob[0], found.log_prob[n], rtol=1e-4, atol=1e-4)


def test_no_response_depends_on_uninitialized_memory() -> None:
    own, (first, _, soft) = packed(fixtures.LLAMA, reference(fixtures.LLAMA)), inputs(5)
    after, of = torch.randint(32, (6, 7), generator=torch.Generator().manual_seed(6)), torch.arange(6)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        assert torch.empty(1).isnan()
        lengths = torch.tensor([4, 1, 7, 3, 7, 2])
        found = decode(own, first.expand(6, -1), after, soft, DecodeOptions(-5, 6), item_of=of, after_lengths=lengths)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.log_prob.isfinite().all()


def test_sampling_depends_on_a_users_generator_alone_and_keeps_to_the_likeliest() -> None:
    own, given = packed(fixtures.LLAMA, reference(fixtures.LLAMA)), inputs(4)

    def sampled(rows: list[int], **options: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        chosen = DecodeOptions(STOP, 6, temperature=1.5, **options)
        tokens = decode(own, given[0], given[1], given[2][rows], chosen, generators).tokens
        return torch.nn.functional.pad(tokens, (0, 6 - tokens.shape[1]), value=-1)

    everyone = sampled([0, 1, 2, 3, 4, 5])
    assert torch.equal(sampled([5, 2]), everyone[[5, 2]])
    greedy = decode(own, *given, DecodeOptions(STOP, 6)).tokens
    assert torch.equal(sampled([0, 1, 2, 3, 4, 5], top_k=1)[:, : greedy.shape[1]], greedy)
    assert torch.equal(sampled([0, 1, 2, 3, 4, 5], top_p=1e-9)[:, : greedy.shape[1]], greedy)
    assert not torch.equal(everyone[:, : greedy.shape[1]], greedy)
    with pytest.raises(ValueError, match="sampling for 6 users needs a generator for each"):
        decode(own, *given, DecodeOptions(STOP, 6, temperature=1.0))


def test_guidance_moves_tokens_away_from_those_of_an_unknown_user() -> None:
    """The reference computes the logits of both complete sequences by transformers at each step."""
    model = reference({**fixtures.LLAMA, "tie_word_embeddings": False})
    own, given = packed({**fixtures.LLAMA, "tie_word_embeddings": False}, model), inputs(5)
    null = torch.randn(2, 24, generator=torch.Generator().manual_seed(5))
    found = decode(own, *given, DecodeOptions(-5, 6, guidance=1.5), null=null)
    both = torch.cat([given[2], null.expand(6, -1, -1)])
    rows, written, log_prob = whole_prompts(model, given[0], given[1], both), [], torch.zeros(6)
    with torch.no_grad():
        for _ in range(6):
            user, unknown = model(inputs_embeds=rows).logits[:, -1].log_softmax(-1).chunk(2)
            token = (2.5 * user - 1.5 * unknown).argmax(-1)
            log_prob += user.gather(1, token[:, None])[:, 0]
            written.append(token)
            rows = torch.cat([rows, model.get_input_embeddings()(token.repeat(2))[:, None]], 1)
    assert torch.equal(found.tokens, torch.stack(written, 1))
    torch.testing.assert_close(found.log_prob, log_prob, rtol=1e-4, atol=1e-4)
    assert not torch.equal(decode(own, *given, DecodeOptions(-5, 6)).tokens, found.tokens)
    with pytest.raises(ValueError, match="guidance needs the soft tokens of an unknown user"):
        decode(own, *given, DecodeOptions(STOP, 6, guidance=1.0))


def test_transformers_still_errs_with_a_cached_prefix() -> None:
    """This bug is the reason for our own decoding loop: if the test fails, `generate` has been repaired."""
    model = reference({**fixtures.LLAMA, "tie_word_embeddings": False})
    before, after, soft = inputs(5)
    whole = whole_prompts(model, before, after, soft)[:1]
    with torch.no_grad():
        right = model.generate(inputs_embeds=whole, max_new_tokens=8, do_sample=False, pad_token_id=0)
        cache = DynamicCache(config=model.config)
        model.model(inputs_embeds=whole[:, :5], past_key_values=cache, use_cache=True)
        wrong = model.generate(
            inputs_embeds=whole[:, 5:], past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
    assert right[0].tolist() != wrong[0].tolist()
