"""Run by test_hstu_triton.py in a process of its own with TRITON_INTERPRET=1: the interpreter changes triton for good.

Every case is compared with the eager backend, which test_hstu.py holds against a loop written from the equations.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hllm_torchrec.modules.encoder_shapes import HSTUShape
from hllm_torchrec.modules.hstu import HSTU
from hllm_torchrec.modules.hstu_triton import bucket_edges
from hllm_torchrec.modules.pointwise_attention import plan_layout, pointwise_attention
from hllm_torchrec.modules.pointwise_layout import RelativeBias, Rules
from hllm_torchrec.modules.user_encoder import PackedRows, pack_rows
from hllm_torchrec.modules.user_llm import Queries

BASE = HSTUShape(width=6, layers=1, qk_width=5, value_width=3, max_positions=40, divide_by=7)
VARIANTS = {
    "research": replace(BASE, heads=2),
    "ranking": replace(BASE, preset="ranking", heads=2),
    "own length": replace(BASE, divide_by="length"),
    "window": replace(BASE, window=7, divide_by="length"),
    "window of one": replace(BASE, window=1),
    "prefix": replace(BASE, prefix=3, divide_by="length"),
    "prefix and window": replace(BASE, prefix=18, window=4, divide_by="length"),
    "next event's time": replace(BASE, time_of="next"),
    "bias table shorter than the history": replace(
        BASE, preset="ranking", relative_bias=True, max_positions=3, time_buckets=9
    ),
}
LENGTHS = [5, 0, 33, 1, 17]
VISIBLE: list[list[int]] = [[4, 1, 5], [0, 0], [33, 2, 20], [], [0]]


def build(shape: HSTUShape) -> HSTU:
    torch.manual_seed(0)
    model = HSTU(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model


def batch(visible: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Queries, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(LENGTHS), 6, generator=generator)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    times = torch.randint(0, 10**6, (sum(LENGTHS),), generator=generator) + 10**12
    for start, end in zip(offsets, offsets[1:]):
        times[start:end] = times[start:end].sort().values
    number = [len(v) for v in visible]
    queries = Queries(
        torch.randn(sum(number), 6, generator=generator),
        torch.tensor([0, *number]).cumsum(0),
        torch.tensor([v for row in visible for v in row], dtype=torch.int64),
        torch.randint(10**6, 10**7, (sum(number),), generator=generator) + 10**12,
    )
    return x, offsets, times, queries, torch.cat([times[1:], times[-1:]]) + 7


def found(model: HSTU, backend: str, visible: list[list[int]]) -> tuple[Tensor, ...]:
    """Outputs, then the gradients of inputs and parameters."""
    model = build(replace(model.shape, backend=backend))
    x, offsets, times, queries, following = batch(visible)
    inputs = [x.requires_grad_(), *([queries.x_QD.requires_grad_()] if any(visible) else []), *model.parameters()]
    h, q = model(x, offsets, times, queries, following)
    weights = torch.randn(h.shape[0] + q.shape[0], 6, generator=torch.Generator().manual_seed(2))
    loss = (torch.cat([h, q]) * weights).sum()
    return h, q, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_equal_the_eager_backend(name: str) -> None:
    model = build(VARIANTS[name])
    triton, eager = (found(model, backend, VISIBLE) for backend in ("triton", "eager"))
    torch.testing.assert_close(triton, eager, rtol=1e-4, atol=1e-5)
    assert all(bool(gradient.any()) for gradient in triton)


def test_a_batch_without_queries_repeats_bit_for_bit_but_for_the_position_bias() -> None:
    model, none = build(VARIANTS["research"]), [[] for _ in LENGTHS]
    first, again, eager = (found(model, backend, none) for backend in ("triton", "triton", "eager"))
    torch.testing.assert_close(first, eager, rtol=1e-4, atol=1e-5)
    names = ["h", "q", "x", *dict(model.named_parameters())]
    different = [name for name, a, b in zip(names, first, again, strict=True) if not torch.equal(a, b)]
    assert set(different) <= {"layers.0.bias.of_position"}


def attended(q: Tensor, rows: PackedRows, rules: Rules, bias: RelativeBias | None, backend: str) -> Tensor:
    return pointwise_attention(q, q, q, plan_layout(rows, rules, backend), bias, backend)


def test_time_buckets_are_exact_at_their_edges() -> None:
    edges = bucket_edges(128, torch.device("cpu"))[[1, 2, 5, 40, 70, 90, 110, 128]]
    times = torch.cat([torch.zeros(1, dtype=torch.int64), edges - 1, edges]).sort().values
    rows = pack_rows(torch.tensor([0, times.numel()]), times.numel(), times)
    bias = RelativeBias(1, 128)
    with torch.no_grad():
        bias.of_time.copy_(torch.arange(129) / 10)
    ones = torch.ones(times.numel(), 1, 1)
    rules = Rules(window=None, prefix=0, divide_by=1, alpha=0.0, last_bucket=128)
    triton, eager = (attended(ones, rows, rules, bias, backend) for backend in ("triton", "eager"))
    torch.testing.assert_close(triton, eager, rtol=1e-6, atol=1e-6)


def test_nothing_of_a_later_position_reaches_an_earlier_one() -> None:
    x = torch.randn(40, 1, 4)
    rules = Rules(window=None, prefix=0, divide_by=3, alpha=1.0, last_bucket=None)
    rows = pack_rows(torch.tensor([0, 3, 40]), 40)
    before = attended(x, rows, rules, None, "triton")
    x[22] += 1.0
    changed = (attended(x, rows, rules, None, "triton") != before).any(-1).flatten().nonzero().flatten().tolist()
    assert changed and min(changed) == 22


def test_bfloat16_is_summed_in_float32() -> None:
    x = torch.randn(200, 1, 4)
    rules = Rules(window=None, prefix=0, divide_by=200, alpha=1.0, last_bucket=None)
    rows = pack_rows(torch.tensor([0, 200]), 200)
    exact = attended(x.bfloat16().double(), rows, rules, None, "eager")
    found = attended(x.bfloat16(), rows, rules, None, "triton")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-3)


def test_no_rows_at_all_run_through() -> None:
    rules = Rules(window=None, prefix=0, divide_by=1, alpha=1.0, last_bucket=None)
    empty = torch.zeros(0, 1, 4, requires_grad=True)
    out = attended(empty, pack_rows(torch.tensor([0, 0]), 0), rules, None, "triton")
    out.sum().backward()
    assert out.shape == (0, 1, 4) and empty.grad is not None


def test_what_the_kernels_lack_is_an_error() -> None:
    rules = Rules(window=None, prefix=0, divide_by=1, alpha=1.0, last_bucket=8)
    rows, bias = pack_rows(torch.tensor([0, 2]), 2), RelativeBias(4, 8)
    with pytest.raises(ValueError, match="'triton': has no kernels for float64: use float32"):
        attended(torch.zeros(2, 1, 4).double(), rows, rules, bias, "triton")
    with pytest.raises(ValueError, match="user.shape.qk_width: 512: 'triton' takes heads up to 256 wide"):
        attended(torch.zeros(2, 1, 512), rows, rules, bias, "triton")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="summed with atomics, in no fixed order"):
            attended(torch.zeros(2, 1, 4), rows, rules, bias, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
