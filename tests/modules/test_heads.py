"""The prediction head of both fusions."""

import math

import pytest
import torch

from hllm_torchrec.modules.heads import Fusion, PredictionHead

WIDTH = 6


def inputs(n: int, fusion: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.randn(n, WIDTH, generator=generator) for _ in range(1 if fusion == "early" else 2))


@pytest.mark.parametrize("fusion", ["early", "late"])
@pytest.mark.parametrize("hidden", [5, [8, 4], []])
def test_one_logit_per_exposure_that_depends_on_its_own_row_alone(fusion: Fusion, hidden: int | list[int]) -> None:
    torch.manual_seed(0)
    head = PredictionHead(WIDTH, hidden, fusion=fusion)
    rows = inputs(4, fusion)
    logits = head(*rows)
    assert logits.shape == (4,)
    for i in range(4):
        torch.testing.assert_close(head(*(x[i : i + 1] for x in rows)), logits[i : i + 1])
    logits.sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in head.parameters())


def test_late_fusion_is_the_mlp_of_both_and_their_product_plus_the_scaled_dot_product() -> None:
    torch.manual_seed(1)
    head = PredictionHead(WIDTH, 5, fusion="late")
    head.dot_scale.data.fill_(2.5)
    user, item = inputs(3, "late")
    u = torch.nn.functional.layer_norm(user, (WIDTH,))
    e = torch.nn.functional.layer_norm(item, (WIDTH,))
    weight, bias = head.mlp.parameters()
    hidden = torch.nn.functional.silu(torch.cat((u, e, u * e), dim=1) @ weight.T + bias)
    expected = (hidden @ head.out.weight.T + head.out.bias)[:, 0] + 2.5 * (u * e).sum(dim=1) / WIDTH
    torch.testing.assert_close(head(user, item), expected)


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_the_scale_of_the_embeddings_does_not_matter(fusion: Fusion) -> None:
    head = PredictionHead(WIDTH, 5, fusion=fusion)
    rows = inputs(3, fusion)
    torch.testing.assert_close(head(*(1000 * x for x in rows)), head(*rows), rtol=1e-3, atol=1e-4)


def test_the_bias_starts_at_the_base_rate() -> None:
    head = PredictionHead(WIDTH, [], fusion="early")
    head.initialize_bias(0.2)
    torch.nn.init.zeros_(head.out.weight)
    torch.testing.assert_close(head(*inputs(3, "early")).sigmoid(), torch.full((3,), 0.2))
    assert math.isclose(head.out.bias.item(), math.log(0.25), rel_tol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1.0, float("nan")])
def test_a_base_rate_of_one_class_is_an_error(rate: float) -> None:
    with pytest.raises(ValueError, match=f"base rate is {rate}: must be between 0 and 1"):
        PredictionHead(WIDTH, 5).initialize_bias(rate)


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_no_exposures_give_no_logits_with_a_graph(fusion: Fusion) -> None:
    head = PredictionHead(WIDTH, 5, fusion=fusion)
    logits = head(*inputs(0, fusion))
    assert logits.shape == (0,)
    logits.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_logits_are_float32_under_autocast(fusion: Fusion) -> None:
    torch.manual_seed(0)
    head = PredictionHead(WIDTH, 5, fusion=fusion)
    rows = inputs(64, fusion)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(*rows)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).any(), "logits hold more digits than bfloat16"
    torch.testing.assert_close(logits, head(*rows), rtol=0.05, atol=0.05)


def test_dropout_acts_in_training_only() -> None:
    head = PredictionHead(WIDTH, 64, dropout=0.5, fusion="early")
    (x,) = inputs(8, "early")
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


def test_a_head_built_on_the_meta_device_resets_all_its_parameters() -> None:
    with torch.device("meta"):
        head = PredictionHead(WIDTH, 5, fusion="late")
    head.to_empty(device="cpu")
    for module in head.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    assert head.dot_scale.tolist() == [1.0]
    assert head(*inputs(2, "late")).isfinite().all()


def test_wrong_uses_are_named() -> None:
    user, item = inputs(2, "late")
    with pytest.raises(ValueError, match="early fusion head was given an item embedding"):
        PredictionHead(WIDTH, 5, fusion="early")(user, item)
    with pytest.raises(ValueError, match="late fusion head was given no item embedding"):
        PredictionHead(WIDTH, 5, fusion="late")(user)
    with pytest.raises(ValueError, match="fusion is 'middle': must be 'early' or 'late'"):
        PredictionHead(WIDTH, 5, fusion="middle")  # type: ignore[arg-type]
