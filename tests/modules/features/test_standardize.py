"""Embeddings with a large common part are spread out by what was measured of them."""

import pytest
import torch

from hllm_torchrec.modules.features.standardize import Standardize, Whiten


def embeddings(rows: int = 200) -> torch.Tensor:
    """[rows, 8], nearly one vector, the first dimension always the same."""
    generator = torch.Generator().manual_seed(0)
    x = 5 + 0.1 * torch.randn(rows, 8, generator=generator)
    x[:, 0] = 3.0
    return x


def test_it_is_the_identity_until_it_has_measured() -> None:
    x, standardise = embeddings(), Standardize(8)
    assert torch.equal(standardise(x), x) and not standardise.measured


def test_measured_embeddings_have_mean_0_and_length_1_and_what_never_varies_is_0() -> None:
    x, standardise = embeddings(), Standardize(8)
    standardise.measure(x)
    y = standardise(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(0)[1:], torch.full((7,), 8**-0.5))
    assert y.norm(dim=1).mean() == pytest.approx((7 / 8) ** 0.5, abs=0.05)
    assert (y[:, 0] == 0).all() and standardise.measured


def test_what_was_common_to_all_no_longer_decides_the_cosine() -> None:
    x, standardise = embeddings(), Standardize(8)
    standardise.measure(x)
    before, after = (torch.nn.functional.normalize(rows, dim=1) for rows in (x, standardise(x)))
    assert (before @ before.T).mean() > 0.99
    assert (after @ after.T).mean().abs() < 0.02


def test_the_measure_is_part_of_the_state_and_the_dtype_stays() -> None:
    x, standardise, other = embeddings(), Standardize(8), Standardize(8)
    standardise.measure(x)
    other.load_state_dict(standardise.state_dict())
    assert torch.equal(other(x), standardise(x)) and other(x.bfloat16()).dtype is torch.bfloat16


def correlated(rows: int = 500) -> torch.Tensor:
    """[rows, 6], of which the first direction has nearly all the variance."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([30.0, 3.0, 1.0, 1.0, 0.5, 0.5])
    mixing = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    return 4 + (torch.randn(rows, 6, generator=generator) * scales) @ mixing


def test_whitened_embeddings_have_no_correlation_equal_variance_and_length_1() -> None:
    x, whiten = correlated(), Whiten(6, shrinkage=0.0)
    assert torch.equal(whiten(x), x) and not whiten.measured
    whiten.measure(x)
    y = whiten(x)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(6) / 6, atol=1e-4, rtol=0)
    torch.testing.assert_close(y.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    assert whiten.measured and whiten(x.bfloat16()).dtype is torch.bfloat16


def test_shrinkage_leaves_directions_of_little_variance_small_and_identical_rows_finite() -> None:
    few, whiten = correlated(3), Whiten(6)
    whiten.measure(few)
    assert whiten(few).norm(dim=1).max() < 3 and torch.isfinite(whiten.weight).all()
    whiten.measure(torch.ones(4, 6))
    assert torch.equal(whiten(torch.ones(4, 6)), torch.zeros(4, 6))


def test_whitening_folded_into_the_projection_equals_the_two_steps_in_values_and_gradients() -> None:
    x, whiten, project = correlated(), Whiten(6), torch.nn.Linear(6, 4)
    whiten.measure(x)
    folded, apart = whiten(x, project), project(whiten(x))
    torch.testing.assert_close(folded, apart, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(y.square().sum(), list(project.parameters())) for y in (folded, apart)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
