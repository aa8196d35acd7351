"""The adapter begins as the identity and can become something else."""

import torch

from hllm_torchrec.modules.features.adapter import Adapter


def test_it_begins_as_the_identity_and_learns() -> None:
    torch.manual_seed(0)
    adapter, x = Adapter(6, 2), torch.randn(5, 6)
    assert torch.equal(adapter(x), x) and adapter(x[:0]).shape == (0, 6)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapter(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(adapter(x), x)
    assert adapter.down.weight.grad.abs().sum() > 0
