"""Candidates scored against a cached history equal the packed query path of training, whose softmax is in float32."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.encoders.base import Queries, UserEncoder
from hllm_torchrec.modules.encoders.ligr import LiGR
from hllm_torchrec.modules.encoders.sasrec import SASRec
from hllm_torchrec.modules.encoders.shapes import HSTUShape, LiGRShape, SASRecShape
from hllm_torchrec.modules.encoders.user_llm import UserLLM
from hllm_torchrec.modules.history_cache import answer, begin_request, read_history
from hllm_torchrec.modules.hstu.layer import HSTU
from tests.helpers.fixtures import USER, enlarge

WIDTH, EVENTS, CANDIDATES, REQUEST = 16, 9, 7, 9000
RESEARCH = HSTUShape(
    width=WIDTH, layers=2, heads=2, qk_width=3, value_width=4, max_positions=12, divide_by=10, time_buckets=40
)


def user_llm(**shape: Any) -> UserLLM:
    return UserLLM(build_backbone(None, {**USER, **shape}, word_embeddings=False))


ENCODERS: dict[str, Callable[[], UserEncoder]] = {
    "user LLM": user_llm,
    "user LLM, grouped queries": lambda: user_llm(num_key_value_heads=2),
    "sasrec": lambda: SASRec(SASRecShape(WIDTH, layers=2, heads=2, max_positions=12)),
    "ligr": lambda: LiGR(LiGRShape(WIDTH, layers=2, heads=2, max_positions=12)),
    "research": lambda: HSTU(RESEARCH),
    "ranking": lambda: HSTU(replace(RESEARCH, preset="ranking")),
    "own length": lambda: HSTU(replace(RESEARCH, divide_by="length")),
    "window": lambda: HSTU(replace(RESEARCH, window=3, divide_by="length")),
    "prefix and window": lambda: HSTU(replace(RESEARCH, prefix=2, window=2, divide_by="length")),
    "bias table shorter than the history": lambda: HSTU(
        replace(RESEARCH, preset="ranking", relative_bias=True, max_positions=3)
    ),
    "normalized outputs beside, free alpha": lambda: HSTU(replace(RESEARCH, output="concat_norm", alpha=0.7)),
    "group norm": lambda: HSTU(replace(RESEARCH, preset="ranking", group_norm=True)),
}
every_encoder = pytest.mark.parametrize("name", list(ENCODERS))


def build(name: str) -> UserEncoder:
    torch.manual_seed(0)
    model = ENCODERS[name]()
    if isinstance(model, UserLLM):
        enlarge(model)
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], times [N] and candidates [Q, D]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EVENTS, WIDTH, generator=generator, dtype=torch.float64)
    times = torch.randint(0, REQUEST, (EVENTS,), generator=generator).sort().values
    return x, times, torch.randn(CANDIDATES, WIDTH, generator=generator, dtype=torch.float64)


def packed(model: UserEncoder, x: Tensor, times: Tensor, candidates: Tensor, visible: int) -> Tensor:
    """The candidates as queries of the training pass."""
    number = candidates.shape[0]
    queries = Queries(
        candidates, torch.tensor([0, number]), torch.full((number,), visible), torch.full((number,), REQUEST)
    )
    with torch.no_grad():
        return model(x, torch.tensor([0, x.shape[0]]), times, queries)[1]


@every_encoder
@pytest.mark.parametrize("visible", [EVENTS, 4, 1, 0])
def test_cached_scores_equal_the_packed_pass_whatever_the_micro_batch(name: str, visible: int) -> None:
    model, (x, times, candidates) = build(name), inputs()
    expected = packed(model, x, times, candidates, visible)
    cache = read_history(model, x, times)
    for micro_batch in (1, 3, CANDIDATES, 100):
        found = answer(model, cache, candidates, REQUEST, visible, micro_batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # candidates differ


@every_encoder
@pytest.mark.parametrize("cuts", [(4,), (2, 3, 8), (0, 5)])
def test_an_extended_cache_equals_a_fresh_one(name: str, cuts: tuple[int, ...]) -> None:
    model, (x, times, candidates) = build(name), inputs()
    fresh = read_history(model, x, times)
    cache = None
    for start, end in zip((0, *cuts), (*cuts, EVENTS)):
        before = None if cache is None else [layer.keys.clone() for layer in cache.layers]
        longer = read_history(model, x[start:end], times[start:end], cache)
        if cache is not None and before is not None:  # still good for a request that was not told of the news
            assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before))
        cache = longer
    assert cache is not None and cache.length == EVENTS
    assert torch.equal(cache.times, fresh.times)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values), rtol=1e-5, atol=1e-5)
    found = answer(model, cache, candidates, REQUEST)
    torch.testing.assert_close(found, packed(model, x, times, candidates, EVENTS), rtol=1e-5, atol=1e-5)


@every_encoder
def test_a_user_without_history_is_scored_by_the_candidate_alone(name: str) -> None:
    model, (x, times, candidates) = build(name), inputs()
    cache = read_history(model, x[:0], times[:0])
    assert cache.length == 0 and all(layer.keys.shape[0] == 0 for layer in cache.layers)
    expected = packed(model, x[:0], times[:0], candidates, 0)
    torch.testing.assert_close(answer(model, cache, candidates, REQUEST), expected, rtol=1e-5, atol=1e-5)


def test_candidates_do_not_see_each_other() -> None:
    model, (x, times, candidates) = build("user LLM"), inputs()
    ask = begin_request(model, read_history(model, x, times), REQUEST)
    changed = candidates.clone()
    changed[1] += 1
    before, after = ask(candidates), ask(changed)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=1e-12, atol=1e-12)
    assert (after[1] - before[1]).abs().max() > 0.01


def test_single_precision_is_close_too() -> None:
    x, times, candidates = (t.float() if t.is_floating_point() else t for t in inputs())
    for name in ("user LLM", "research"):
        model = build(name).float()
        found = answer(model, read_history(model, x, times), candidates, REQUEST)
        torch.testing.assert_close(found, packed(model, x, times, candidates, EVENTS), rtol=1e-4, atol=1e-4)


def test_the_cache_holds_keys_and_values_of_every_layer_and_its_size_is_known() -> None:
    model, (x, times, _) = build("user LLM, grouped queries"), inputs()
    cache = read_history(model, x, times)
    width = 2 * USER["hidden_size"] // USER["num_attention_heads"]
    assert cache.nbytes == EVENTS * 8 + USER["num_hidden_layers"] * 2 * EVENTS * width * 8
    assert not cache.layers[0].keys.requires_grad


def test_what_cannot_be_cached_is_an_error() -> None:
    model, (x, times, candidates) = build("research"), inputs()
    cache = read_history(model, x, times)
    with pytest.raises(ValueError, match="before the last cached event .*append events in order of time"):
        read_history(model, x[:1], times[:1], cache)
    with pytest.raises(ValueError, match="visible is 10: the cache has 9 events; give 0 to 9"):
        begin_request(model, cache, REQUEST, 10)
    with pytest.raises(ValueError, match="micro_batch is 0: must be at least 1"):
        answer(model, cache, candidates, REQUEST, micro_batch=0)
    with pytest.raises(ValueError, match="training mode"):
        answer(model.train(), cache, candidates, REQUEST)
    with pytest.raises(ValueError, match="time_of: 'next': a cached history would change .*train with 'event'"):
        read_history(HSTU(replace(RESEARCH, time_of="next")).eval(), x, times)
    with pytest.raises(ValueError, match="count_from: 'end': .*train with 'start'"):
        read_history(SASRec(SASRecShape(WIDTH, layers=1, count_from="end")).eval(), x, times)
    with pytest.raises(ValueError, match="max_positions: 12: a row stands at position 12"):
        long = read_history(build("research"), x.repeat(2, 1)[:12], torch.arange(12))
        answer(build("research"), long, candidates, REQUEST)


def test_a_context_prefix_is_read_at_once() -> None:
    model, (x, times, _) = build("prefix and window"), inputs()
    cache = read_history(model, x[:1], times[:1])
    with pytest.raises(ValueError, match="fewer than the context prefix of 2, .*read the complete history again"):
        read_history(model, x[1:], times[1:], cache)


def test_a_sliding_window_that_would_cut_the_history_is_refused() -> None:
    torch.manual_seed(0)
    shape = {**USER, "model_type": "mistral", "sliding_window": EVENTS}
    model = UserLLM(build_backbone(None, shape, word_embeddings=False)).double().eval()
    x, times, candidates = inputs()
    cache = read_history(model, x, times)
    with pytest.raises(ValueError, match="a sequence has 10 positions, beyond the backbone's sliding window of 9"):
        answer(model, cache, candidates, REQUEST)
