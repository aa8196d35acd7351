"""Options of in-backward optimizers: they reach FBGEMM's kernel, and wrong ones are refused at the start."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.table_optimizers import REPLICATED, TABLE_OPTIMIZERS
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.embedding.optimizers import TableSettings, apply_table_optimizer
from hllm_torchrec.embedding.sharding import distribute, plan_table_sharding
from hllm_torchrec.embedding.tables import initialize_tables, local_shards
from tests.helpers import fixtures

ROWS, WIDTH, LR = 4, 8, 0.5


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def step(optimizer: str, options: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A table's weights before and after a step whose gradient is the third."""
    optim = {"table_optimizer": optimizer, "table_lr": LR, "table_options": options}
    settings = TableSettings.of(fixtures.config(features={"shard_from_rows": 1}, optim=optim))
    device = init_distributed()
    table = EmbeddingBagConfig(name="t", num_embeddings=ROWS, embedding_dim=WIDTH, feature_names=["t"])
    one = torch.nn.Sequential(EmbeddingBagCollection(tables=[table], device=torch.device("meta")))
    apply_table_optimizer(one[0], settings)
    model = distribute(one, plan_table_sharding(one, settings, device), device, ddp=False)
    initialize_tables(model, seed=0, scale=1.0)
    ((weights, _, _),) = [part for value in model.state_dict().values() for part in local_shards(value)]
    before, gradient = weights.clone(), torch.arange(1.0, WIDTH + 1).expand(ROWS, -1)
    bags = KeyedJaggedTensor(["t"], torch.arange(ROWS), lengths=torch.ones(ROWS, dtype=torch.int64))
    (model(bags).values() * gradient).sum().backward()
    return before, weights.clone(), gradient


@pytest.mark.parametrize("eps", [1e-8, 3.0])
def test_the_epsilon_of_adagrad_reaches_the_kernel(eps: float) -> None:
    before, after, gradient = step("adagrad", {"eps": eps})
    torch.testing.assert_close(after, before - LR * gradient / (gradient.abs() + eps))
    destroy_distributed()
    before, after, gradient = step("rowwise_adagrad", {"eps": eps})
    spread = gradient.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(after, before - LR * gradient / (spread + eps))


@pytest.mark.parametrize("name", [name for name, kind in TABLE_OPTIMIZERS.items() if not kind.cuda_only])
def test_every_option_of_the_table_is_taken(name: str) -> None:
    before, after, _ = step(name, dict.fromkeys(TABLE_OPTIMIZERS[name].options, 0.5))
    assert (before != after).all()


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            {"table_optimizer": "adagard"},
            "optim.table_optimizer: 'adagard': must be one of sgd, rowwise_adagrad, adagrad, partial_rowwise_adam, "
            "adam (did you mean 'adagrad'?)",
        ),
        (
            {"table_optimizer": "adam", "table_options": {"beta": 0.5}},
            "optim.table_options.beta: no option of adam: it takes eps, beta1, beta2, weight_decay",
        ),
        (
            {"table_optimizer": "sgd", "table_options": {"momentum": 0.5}},
            "optim.table_options.momentum: no option of sgd: it takes none",
        ),
        (
            {"table_optimizer": "adam", "table_options": {"beta2": 1.0}},
            "optim.table_options.beta2: 1.0: must be >= 0 and < 1",
        ),
    ],
)
def test_a_wrong_name_or_option_is_one_line(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        fixtures.config(optim=optim)
    assert raised.value.problems == [message]


def test_every_class_of_the_table_is_there_and_no_two_are_alike() -> None:
    kinds = [*TABLE_OPTIMIZERS.values(), REPLICATED]
    assert len({kind.optimizer for kind in kinds}) == len(kinds)
    assert all(issubclass(kind.optimizer, torch.optim.Optimizer) for kind in kinds)
