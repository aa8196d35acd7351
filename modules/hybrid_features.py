"""ID and timestamp features, sum-pooled with the item embedding before the User LLM (HLLM, appendix A).

    x_i = P(E_i) + ID_i + action_i + ... + MLP([year_i, ..., second_i]) + W n_i        (Table 12, Algorithm 1)

All tables live in one TorchRec `EmbeddingBagCollection`, so TorchRec shards them; this module only meets its
interface. The jagged features hold one bag per *slot*: history positions, then query tokens, then (late
fusion) the target items; a bag may be empty (adds nothing) or hold several values (genres: they sum).

Legend: S slots, D width of the user encoder, C time components, F numeric features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.modules.timestamps import TABLE_SIZES, TIME_FEATURES, TimestampMLP


def table_config(name: str, rows: int, width: int, scale: float = 0.02) -> EmbeddingBagConfig:
    """One sum-pooled table whose feature bears its name; entries start uniform in +-scale."""
    return EmbeddingBagConfig(
        name=name,
        embedding_dim=width,
        num_embeddings=rows,
        feature_names=[name],
        pooling=PoolingType.SUM,
        weight_init_min=-scale,
        weight_init_max=scale,
    )


class HybridFeatures(nn.Module):
    """Sum over tables, merged time and numeric features, for every slot.

    Args:
        tables: {feature: number of rows}; all D wide, summed.
        width: D.
        time_depth: how many components of year..second are used (0: none); time_width: width of each table.
        numeric: number F of numeric inputs (0: none), through one linear layer without bias.
        scale: table entries start uniform in +-scale.
        device: of the tables ("meta" before sharding).
    """

    def __init__(
        self,
        tables: dict[str, int],
        width: int,
        *,
        time_depth: int = 6,
        time_width: int = 32,
        numeric: int = 0,
        scale: float = 0.02,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.summed: Sequence[str] = tuple(tables)
        self.time_features: Sequence[str] = TIME_FEATURES[:time_depth]
        configs = [table_config(name, rows, width, scale) for name, rows in tables.items()]
        configs += [
            table_config(name, rows, time_width, scale)
            for name, rows in zip(self.time_features, TABLE_SIZES[:time_depth], strict=True)
        ]
        self.tables = EmbeddingBagCollection(tables=configs, device=device) if configs else None
        self.merge_time = TimestampMLP(time_width, width, time_depth) if time_depth else None
        self.numeric = nn.Linear(numeric, width, bias=False) if numeric else None

    def forward(self, features: KeyedJaggedTensor, numeric: Tensor | None) -> Tensor:
        """features: S bags per key; numeric [S, F] float32 or None -> [S, D]."""
        total: Tensor | None = None
        if self.tables is not None:
            pooled = self.tables(features).to_dict()
            terms = [pooled[name] for name in self.summed]
            if self.merge_time is not None:
                # Slots without a time (late fusion's targets) have empty bags in all components: no time is added.
                merged = self.merge_time(torch.cat([pooled[name] for name in self.time_features], dim=-1))
                has_time = features[self.time_features[0]].lengths() > 0
                terms.append(merged * has_time[:, None])
            total = torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
        if self.numeric is not None and numeric is not None:
            projected = self.numeric(numeric)
            total = projected if total is None else total + projected
        if total is None:
            return torch.zeros(features.stride(), self.width, device=features.device())
        return total
