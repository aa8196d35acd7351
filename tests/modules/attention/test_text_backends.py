"""The registry of attention kernels: what it chooses, what it refuses, and the plan of variable-length kernels."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hllm_torchrec.modules.attention import text_backends
from hllm_torchrec.modules.attention.text import ScoreLimits, TextLayout
from hllm_torchrec.modules.attention.text_backends import (
    TEXT_BACKENDS,
    AttentionBackend,
    Sequences,
    choose_text_backend,
    plan_text,
    plan_varlen,
    register_backend,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

LAYOUTS = {
    "a prefix": TextLayout([5, 2, 1], prefix=3),
    "a prefix that some do not have": TextLayout([7, 1, 6, 6, 2, 0], prefix=4, num_without_prefix=2),
    "no prefix": TextLayout([30, 9, 9, 8, 1]),
    "texts that are all prefix": TextLayout([0, 0], prefix=2),
    "only texts without it": TextLayout([3, 2], prefix=2, num_without_prefix=2),
    "without causality": TextLayout([9, 5, 5, 1], causal=False),
}


def loop_kernel(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float, dropout: float
) -> Tensor:
    """What a variable-length kernel has to compute, one sequence and head at a time."""
    cu_q, cu_k = sequences.cu_q, sequences.cu_k
    assert cu_q.dtype == cu_k.dtype == torch.int32 and dropout == 0
    groups = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    for (q0, q1), (k0, k1) in zip(zip(cu_q, cu_q[1:]), zip(cu_k, cu_k[1:]), strict=True):
        n, m = int(q1 - q0), int(k1 - k0)
        assert 0 < n <= sequences.longest_q and m <= sequences.longest_k
        for head in range(query.shape[1]):
            scores = query[q0:q1, head] @ key[k0:k1, head // groups].T * scaling
            if sequences.causal:
                scores = scores.masked_fill(torch.ones(n, m).triu(m - n + 1).bool(), float("-inf"))
            out[q0:q1, head] = scores.softmax(-1) @ value[k0:k1, head // groups]
    return out


LOOP = AttentionBackend("loop", loop_kernel, lambda device, dtype: None)


def oracle(layout: TextLayout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every text with the prefix in front of it, alone; the prefix' rows come from itself alone."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    prefix = torch.arange(layout.prefix)
    outputs = [alone(layout.causal, prefix, prefix, q, k, v)]
    start = layout.prefix
    for number, length in enumerate(layout.lengths):
        own = torch.arange(start, start + length)
        keys = own if number < layout.num_without_prefix else torch.cat([prefix, own])
        outputs.append(alone(layout.causal, own, keys, q, k, v))
        start += length
    return torch.cat(outputs)


def alone(causal: bool, rows: Tensor, keys: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("ihd,jhd->hij", q[rows], k[keys]) * 0.3
    if causal:
        scores = scores.masked_fill(keys[None, :] > rows[:, None], float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[keys])


@pytest.mark.parametrize("backend", ["buckets", "loop"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_backend_attends_as_texts_that_are_read_alone(name: str, backend: str) -> None:
    layout = LAYOUTS[name]
    rows = layout.prefix + sum(layout.lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    plan = plan_text(layout, LOOP if backend == "loop" else TEXT_BACKENDS[backend], CPU)
    ours, theirs = plan.attend(q, k, v, 0.3, 0.0), oracle(layout, q, k, v)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(ours.shape, generator=generator)
    mine = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((theirs * weights).sum(), (q, k, v))
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    in_front = [layout.prefix * (number >= layout.num_without_prefix) for number in range(len(layout.lengths))]
    starts = [(0, layout.prefix), *((first, length) for first, length in zip(in_front, layout.lengths, strict=True))]
    assert plan.position_ids.tolist() == [[first + i for first, length in starts for i in range(length)]]
    assert plan.longest == max(layout.prefix, *(f + n for f, n in zip(in_front, layout.lengths, strict=True)))


def limited_oracle(layout: TextLayout, q: Tensor, k: Tensor, v: Tensor, limits: ScoreLimits) -> Tensor:
    """Like `oracle`, with a window and capped scores, one row and head at a time."""
    groups = q.shape[1] // k.shape[1]
    out, start = torch.empty_like(q), 0
    for number, length in enumerate([layout.prefix, *layout.lengths]):
        seen = layout.prefix if number > layout.num_without_prefix else 0
        keys = [*range(seen), *range(start, start + length)]
        for place in range(length):
            at = seen + place
            near = [j for j in range(len(keys)) if limits.window is None or abs(at - j) < limits.window]
            near = [keys[j] for j in near if not layout.causal or j <= at]
            for head in range(q.shape[1]):
                scores = k[near, head // groups] @ q[start + place, head] * 0.3
                if limits.softcap is not None:
                    scores = limits.softcap * torch.tanh(scores / limits.softcap)
                out[start + place, head] = scores.softmax(-1) @ v[near, head // groups]
        start += length
    return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("backend", "limits"),
    [
        ("buckets", ScoreLimits(window=3)),
        ("buckets", ScoreLimits(softcap=0.7)),
        ("buckets", ScoreLimits(window=2, softcap=0.7)),
        ("flex", ScoreLimits(window=3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_windows_and_caps_of_a_layer_are_those_of_texts_that_are_read_alone(
    name: str, backend: str, limits: ScoreLimits
) -> None:
    layout = LAYOUTS[name]
    rows = layout.prefix + sum(layout.lengths)
    generator = torch.Generator().manual_seed(0)
    # FlexAttention has no backward pass on a CPU.
    q, k, v = (torch.randn(rows, heads, 16, generator=generator) for heads in (4, 2, 2))
    q, k, v = (x.requires_grad_(backend == "buckets") for x in (q, k, v))
    plan = plan_text(layout, TEXT_BACKENDS[backend], CPU).limited(limits)
    ours, theirs = plan.attend(q, k, v, 0.3, 0.0), limited_oracle(layout, q, k, v, limits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if backend == "buckets":
        weights = torch.randn(ours.shape, generator=generator)
        mine = torch.autograd.grad((ours * weights).sum(), (q, k, v))
        expected = torch.autograd.grad((theirs * weights).sum(), (q, k, v))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    if layout.causal and all(layout.lengths):
        last = layout.prefix + torch.tensor(layout.lengths).cumsum(0) - 1
        torch.testing.assert_close(plan.attend_last(q[last], k, v, 0.3, 0.0), theirs[last], rtol=1e-4, atol=1e-5)


def test_a_kernel_without_a_cap_is_not_chosen_for_a_model_that_caps_its_scores() -> None:
    assert choose_text_backend("auto", CPU, torch.float32, softcap=True).backend.name == "buckets"
    with pytest.raises(ValueError, match="attention: flex .*runs on CUDA only"):
        choose_text_backend("flex", CPU, torch.float32, softcap=True)
    plan = plan_text(TextLayout([2]), TEXT_BACKENDS["flex"], CPU).limited(ScoreLimits(softcap=1.0))
    x = torch.zeros(2, 1, 16)
    with pytest.raises(ValueError, match="attention: flex: .* cannot cap scores, .*; choose buckets or flash"):
        plan.attend(x, x, x, 1.0, 0.0)


def test_queries_and_keys_run_in_the_dtype_of_the_values() -> None:
    """As under autocast, where rotary embeddings leave queries and keys in float32."""
    seen: list[torch.dtype] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *args: object, **options: object) -> Tensor:
        seen.extend(x.dtype for x in (query, key, value))
        return query

    plan = plan_varlen(TextLayout([2, 1], prefix=2), kernel, CPU)
    q = torch.zeros(5, 1, 8)
    assert plan.attend(q, q, q.bfloat16(), 1.0, 0.0).dtype == torch.bfloat16
    assert seen == [torch.bfloat16] * 3


def test_a_layout_of_unsorted_texts_or_an_encoder_with_a_prefix_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="longer texts come first"):
        TextLayout([1, 2])
    with pytest.raises(AssertionError, match="would see the texts"):
        TextLayout([2, 1], prefix=1, causal=False)


# ------------------------------------------------------------------------------------ the choice


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield


def test_on_a_cpu_buckets_are_chosen_and_the_reason_is_said() -> None:
    choice = choose_text_backend("auto", CPU, torch.float32)
    assert choice.backend is TEXT_BACKENDS["buckets"]
    assert str(choice).startswith("buckets: varlen runs on CUDA only (this is cpu), flash ")
    assert str(choose_text_backend("buckets", CPU, torch.float32)) == "buckets: asked for"


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_varlen_is_chosen_in_bf16_and_buckets_in_fp32() -> None:
    assert str(choose_text_backend("auto", CUDA, torch.bfloat16)) == "varlen: the default on cuda"
    choice = choose_text_backend("auto", CUDA, torch.float32)
    assert choice.backend is TEXT_BACKENDS["buckets"] and "varlen runs in bfloat16 or float16 (this is float32" in str(
        choice
    )


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        (
            "quick",
            CPU,
            torch.float32,
            "^attention: 'quick': unknown; choose auto or one of varlen, flash, buck",
        ),
        ("varlen", CPU, torch.bfloat16, r"^attention: varlen runs on CUDA only \(this is cpu\); choose auto"),
        ("varlen", CUDA, torch.float32, r"varlen runs in bfloat16 or float16 \(this is float32\)"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_what_cannot_run_is_refused(name: str, device: torch.device, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_text_backend(name, device, dtype)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"varlen needs compute capability 8.0 \(this GPU has 7.5\)"):
        choose_text_backend("varlen", CUDA, torch.bfloat16)


@pytest.mark.usefixtures("gpu")
def test_flash_needs_its_package_and_then_what_varlen_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"flash is not installed \(pip install flash-attn\)"):
        choose_text_backend("flash", CUDA, torch.bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_text_backend("flash", CUDA, torch.bfloat16).backend is TEXT_BACKENDS["flash"]
    with pytest.raises(ValueError, match="flash runs in bfloat16 or float16"):
        choose_text_backend("flash", CUDA, torch.float32)


def test_torchs_kernel_refuses_dropout() -> None:
    plan = plan_text(TextLayout([2, 1], prefix=2), TEXT_BACKENDS["varlen"], CPU)
    q = torch.zeros(5, 1, 8)
    with pytest.raises(ValueError, match="varlen: torch's kernel has no dropout, .* is 0.1; choose buckets or flash"):
        plan.attend(q, q, q, 1.0, 0.1)


@pytest.mark.slow  # each shape is compiled
@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_attends_as_texts_that_are_read_alone(name: str) -> None:
    """On a CPU it has a forward pass alone; scripts/gpu/gpu_check.py compares gradients."""
    layout = LAYOUTS[name]
    q, k, v = (torch.randn(layout.prefix + sum(layout.lengths), heads, 8) for heads in (4, 2, 2))
    ours = plan_text(layout, TEXT_BACKENDS["flex"], CPU).attend(q, k, v, 0.3, 0.0)
    torch.testing.assert_close(ours, oracle(layout, q, k, v), rtol=1e-5, atol=1e-5)


def test_flex_runs_on_cuda_in_any_dtype_and_is_never_chosen_unasked() -> None:
    assert str(choose_text_backend("flex", CUDA, torch.float32)) == "flex: asked for"
    assert list(TEXT_BACKENDS)[-1] == "flex", "auto stops at buckets, in front of it"
    with pytest.raises(ValueError, match=r"^attention: flex runs on CUDA only \(this is cpu\)"):
        choose_text_backend("flex", CPU, torch.float32)
    plan = plan_text(TextLayout([2, 1], prefix=2), TEXT_BACKENDS["flex"], CPU)
    q = torch.zeros(5, 1, 8)
    with pytest.raises(ValueError, match="flex: FlexAttention has no dropout, .* is 0.1; choose buckets or flash"):
        plan.attend(q, q, q, 1.0, 0.1)


def test_a_registered_backend_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_backends, "TEXT_BACKENDS", dict(TEXT_BACKENDS))
    register_backend(LOOP)
    assert choose_text_backend("loop", CPU, torch.float32).backend is LOOP
    assert choose_text_backend("auto", CPU, torch.float32).backend.name == "buckets", "tried before later ones"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("backend", ["varlen", "flash", "flex"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_on_a_gpu_equal_buckets(name: str, backend: str) -> None:
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    layout = LAYOUTS[name]
    rows = layout.prefix + sum(layout.lengths)
    q, k, v = (torch.randn(rows, h, 64, device=CUDA, dtype=torch.bfloat16).requires_grad_() for h in (4, 2, 2))
    found = []
    for kind in (backend, "buckets"):
        out = plan_text(layout, TEXT_BACKENDS[kind], CUDA).attend(q, k, v, 0.125, 0.0)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
