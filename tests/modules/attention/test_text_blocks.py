"""Attention in blocks: values and gradients of rotation and `BucketPlan`'s attention, in double precision."""

import pytest
import torch
from torch import Tensor

from hllm_torchrec.modules.attention import dense_attention
from hllm_torchrec.modules.attention.text import BucketPlan, ScoreLimits, TextLayout, plan_buckets
from hllm_torchrec.modules.attention.text_blocks import attend_blocks, text_blocks
from hllm_torchrec.modules.encoders.fused_products import rotate

HEADS, WIDTH = 4, 6
LAYOUTS = {
    "a prefix for some texts": TextLayout([7, 2, 2, 9, 8, 8, 3, 1], prefix=3, num_without_prefix=3),
    "no prefix": TextLayout([30, 29, 28, 2, 1, 1]),
    "bidirectional": TextLayout([30, 29, 28, 2, 1, 1], causal=False),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[0])).requires_grad_()


def angles(plan: BucketPlan) -> tuple[Tensor, Tensor]:
    turned = plan.position_ids[0, :, None] * torch.linspace(0.1, 1, WIDTH // 2, dtype=torch.float64).repeat(2)
    return turned.cos(), turned.sin()


def assert_equal(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    weights = random(*found.shape).detach()
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)]
    torch.testing.assert_close([found, *gradients[0]], [expected, *gradients[1]])


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_values_and_gradients_are_those_of_buckets(layout: TextLayout, groups: int) -> None:
    plan = plan_buckets(layout, torch.device("cpu"))
    assert any(bucket.cells is not None for bucket in plan.buckets), "some bucket has padding"
    cos, sin = angles(plan)
    product = random(len(cos), HEADS + 2 * groups, WIDTH)
    query, key, value = product.split([HEADS, groups, groups], 1)
    expected = plan.attend(rotate(query, cos, sin), rotate(key, cos, sin), value, 0.3, 0.0).flatten(1)
    blocks = text_blocks(plan, HEADS, groups, False, torch.float64)
    assert_equal(attend_blocks(product, None, cos, sin, blocks, 0.3), expected, [product])


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_last_positions_alone(layout: TextLayout, groups: int) -> None:
    plan = plan_buckets(layout, torch.device("cpu"))
    cos, sin = angles(plan)
    query, product = random(len(layout.lengths), HEADS, WIDTH), random(len(cos), 2 * groups, WIDTH)
    key, value = product.split(groups, 1)
    expected = plan.attend_last(query, rotate(key, cos, sin), value, 0.3, 0.0).flatten(1)
    blocks = text_blocks(plan, HEADS, groups, True, torch.float64)
    assert_equal(attend_blocks(product, query, cos, sin, blocks, 0.3), expected, [query, product])


def test_only_short_texts_of_a_training_pass_attend_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_buckets(LAYOUTS["a prefix for some texts"], torch.device("cpu"))
    assert plan.attends_in_blocks and plan.blocks(4, 2, True, torch.bfloat16) is plan.blocks(4, 2, True, torch.bfloat16)
    assert not plan.limited(ScoreLimits(window=2)).attends_in_blocks
    with torch.no_grad():
        assert not plan.attends_in_blocks
    monkeypatch.setattr(dense_attention, "LONGEST", 11)  # the longest text is of 9 rows behind the prefix
    assert not plan.attends_in_blocks
