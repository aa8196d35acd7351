"""Quantization of a trained model's tables for serving, with TorchRec's quantized EmbeddingBagCollection.

    row = scale * code + bias        code in 0..255; scale = (max - min) / 255 and bias = min of the row, in float16

The error of an entry is at most half a step of its row, (max - min) / 510, plus the rounding of scale and bias to
float16. Small tables, with fewer rows than `features.shard_from_rows`, and tables of open vocabularies are not
quantized.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.inference.modules import quantize_embeddings
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantizedCollection

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.embedding.tables import assemble_tensor
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.item_source import StoredItems
from hllm_torchrec.modules.features.frozen_items import FROZEN_ITEMS, FrozenItems
from hllm_torchrec.modules.features.hybrid import table_config

TABLE_TYPES = {"int8": torch.qint8, "fp16": torch.float16}
"""Data types of served tables. int8 needs four additional bytes per row for scale and bias."""

ROWS_AT_ONCE = 65_536
"""Number of item vectors looked up at a time."""


@dataclass(frozen=True)
class TableBytes:
    """Table -> number of bytes, before and after quantization."""

    before: dict[str, int]
    after: dict[str, int]


def check_table_type(dtype: str) -> None:
    """Check that `dtype` is one of `TABLE_TYPES`.

    Raises:
        ValueError: the type is unknown.
    """
    if dtype not in TABLE_TYPES:
        known = ", ".join(TABLE_TYPES)
        raise ValueError(f"table_dtype: {dtype!r}: unknown{did_you_mean(dtype, TABLE_TYPES)}; choose one of {known}")


def quantize_collection(weights: Mapping[str, Tensor], types: Mapping[str, torch.dtype]) -> QuantizedCollection:
    """Build quantized sum-pooled tables, each with one feature of the same name.

    Args:
        weights: table -> [rows, width] float32 or float16.
        types: table -> qint8, float16 or float32.
    """
    configs = [table_config(name, *weight.shape) for name, weight in weights.items()]
    device = next(iter(weights.values())).device
    plain = EmbeddingBagCollection(tables=configs, device=device)
    with torch.no_grad():
        for name, weight in weights.items():
            plain.embedding_bags[name].weight.copy_(weight)
    # quantize_embeddings replaces children of a module, so the collection needs a parent module.
    holder = nn.ModuleDict({"tables": plain})
    found = quantize_embeddings(holder, torch.qint8, inplace=True, per_table_weight_dtype=dict(types))["tables"]
    assert isinstance(found, QuantizedCollection)
    return found


def quantize_tables(experiment: Experiment, dtype: str = "int8") -> TableBytes:
    """Replace a trained model's tables by quantized ones; afterwards the model cannot be trained or saved.

    Raises:
        ValueError: the type is unknown, or there is more than one process.
    """
    check_table_type(dtype)
    if dist.get_world_size() > 1:
        raise ValueError(
            f"{dist.get_world_size()} processes: quantized tables need exactly one; start one process (the training "
            "run may have used more)"
        )
    features = experiment.hllm.features
    if features.tables is None:
        return TableBytes({}, {})
    start = "features.tables.embedding_bags."
    weights = {
        name.removeprefix(start).removesuffix(".weight"): assemble_tensor(value).detach().to(experiment.device)
        for name, value in experiment.model.state_dict().items()
        if name.startswith(start)
    }
    least = experiment.config.features.shard_from_rows
    types = {name: TABLE_TYPES[dtype] if len(w) >= least else torch.float32 for name, w in weights.items()}
    features.tables = quantize_collection(weights, types)
    return TableBytes(_bytes(weights), table_bytes(features.tables))


@torch.no_grad()
def quantize_items(experiment: Experiment, dtype: str = "int8") -> TableBytes:
    """Replace the model's source of item embeddings by a quantized table of the complete catalogue.

    The embeddings are computed by the Item LLM with the current weights or, if the run uses stored ones, looked up in
    the model's table of stored embeddings. An ID-only model is not changed.

    Raises:
        ValueError: the type is unknown.
    """
    check_table_type(dtype)
    vectors = _catalogue(experiment)
    if vectors is None:
        return TableBytes({}, {})
    # The float table is on the meta device, so it is never allocated; the next line replaces it.
    items = FrozenItems(vectors.shape[0], vectors.shape[1], "fp32", torch.device("meta"))
    items.table = quantize_collection({FROZEN_ITEMS: vectors}, {FROZEN_ITEMS: TABLE_TYPES[dtype]})
    experiment.hllm.item_source = StoredItems(items, experiment.hllm.adapter)
    return TableBytes(_bytes({FROZEN_ITEMS: vectors}), table_bytes(items.table))


def _catalogue(experiment: Experiment) -> Tensor | None:
    """Item embeddings [N, E] before the adapter, which is applied after the lookup; None in an ID-only model."""
    source = experiment.hllm.item_source
    if not isinstance(source, StoredItems):
        return experiment.encode_catalogue()
    blocks = torch.arange(experiment.dataset.num_items, device=experiment.device).split(ROWS_AT_ONCE)
    return torch.cat([source.raw(block) for block in blocks])


def table_bytes(tables: QuantizedCollection) -> dict[str, int]:
    """Bytes of each quantized table, including scales and biases."""
    return {
        name.removesuffix(".weight").rpartition(".")[2]: weight.numel() * weight.element_size()
        for name, weight in _weights_with_scales(tables)
    }


def _weights_with_scales(tables: QuantizedCollection) -> list[tuple[str, Tensor]]:
    # TorchRec has one module per group of tables (by pooling and data type), in the order of `_key_to_tables`.
    names = [table.name for _, group in tables._key_to_tables.items() for table in group]
    rows = [w for module in tables._emb_modules for w, _ in module.split_embedding_weights(split_scale_shifts=False)]
    return list(zip(names, rows, strict=True))


def _bytes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: weight.numel() * weight.element_size() for name, weight in weights.items()}
