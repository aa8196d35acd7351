"""The model written out without packing, and what tests of the assembled model share."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.events import Piece
from hllm_torchrec.data.numeric_features import NUMERIC_FEATURES, numeric_columns
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.models.hllm_output import HLLMOutput
from hllm_torchrec.modules.features.hybrid import ACTION_GATE
from hllm_torchrec.modules.features.timestamps import TIME_FEATURES
from tests.helpers import fixtures

FEATURES = {
    "item_features": ("genres",),
    "user_features": ("country",),
    "numeric_features": tuple(NUMERIC_FEATURES),
}


def config(fusion: str, weight: float = 0.5, **sections: Any) -> Config:
    """Every feature on; `weight` is lambda."""
    sections["data"] = FEATURES | sections.get("data", {})
    sections["features"] = {"action_gate": True} | sections.get("features", {})
    sections["objective"] = {"fusion": fusion, "generative_weight": weight} | sections.get("objective", {})
    return fixtures.config(**sections)


def some_pieces() -> list[Piece]:
    return [*fixtures.pieces("train")[:4], *fixtures.pieces("valid")[:2]]


def run(model: HLLM, cfg: Config, pieces: Iterable[Piece], training: bool = False) -> tuple[HybridBatch, HLLMOutput]:
    batch = fixtures.collator(cfg, training=training)(list(pieces), 0, 0)
    return batch, model(batch)


def exposures(piece: Piece) -> list[int]:
    return [i for i in range(piece.first_target, piece.item_ids.size) if not np.isnan(piece.labels[i])]


def alone(piece: Piece, target: int) -> Piece:
    """The piece up to one exposure, which is its only one."""
    return piece.cut(0, target + 1, target)


class Naive:
    """Equations of the paper for one exposure: stock Hugging Face models, plain look-ups, no packing."""

    def __init__(self, model: HLLM, cfg: Config) -> None:
        assert model.item_llm is not None and cfg.item_llm.shape is not None and cfg.user.shape is not None
        self.model, self.cfg = model, cfg
        self.item_llm = build_backbone(None, cfg.item_llm.shape, attention="eager").eval()
        self.item_llm.load_state_dict(model.item_llm.backbone.state_dict())
        self.user = build_backbone(None, cfg.user.shape, word_embeddings=False, attention="eager").eval()
        self.user.load_state_dict(model.user.backbone.state_dict())
        self.dataset = fixtures.dataset()

    def row(self, table: str, row: int) -> Tensor:
        tables = self.model.features.tables
        assert tables is not None
        return tables.embedding_bags[table].weight[row]

    def text(self, item: int) -> Tensor:
        assert self.model.item_llm is not None
        tokens, _ = fixtures.token_store().gather(np.array([item]))
        words = self.item_llm.get_input_embeddings()(torch.from_numpy(tokens).long())
        row = torch.cat([words, self.model.item_llm.item_token[None]])
        return self.item_llm(inputs_embeds=row[None]).last_hidden_state[0, -1]

    def item(self, item: int) -> Tensor:
        """P(E) + ID + genres."""
        x = self.model.project_item(self.text(item)) + self.row("item_id", item)
        for genre in self.dataset.items["feature_genres"][item - 1].as_py():
            x = x + self.row("genres", genre)
        return x

    def time(self, second: int) -> Tensor:
        moment = datetime.fromtimestamp(second, UTC)
        parts = (moment.year, moment.month, moment.day, moment.hour, moment.minute, moment.second)
        rows = [self.row(name, part) for name, part in zip(TIME_FEATURES, parts)]
        assert self.model.features.merge_time is not None
        return self.model.features.merge_time(torch.cat(rows))

    def event(self, piece: Piece, i: int) -> Tensor:
        action = int(piece.actions[i])
        x = self.item(int(piece.item_ids[i])) * (1 + self.row(ACTION_GATE, action))
        return x + self.row("action", action) + self.time(int(piece.timestamps[i]))

    def request(self, piece: Piece, target: int) -> Tensor:
        """All that is known of the request itself, without the target."""
        x = self.row("action", 0) + self.time(int(piece.timestamps[target]))
        for country in self.dataset.users["feature_country"][piece.user_id - 1].as_py():
            x = x + self.row("country", country)
        numbers = numeric_columns(self.cfg.data.numeric_features, piece.timestamps, piece.labels, np.array([target]))
        assert self.model.features.numeric is not None
        return x + self.model.features.numeric(torch.from_numpy(numbers))[0]

    def history(self, piece: Piece, target: int) -> list[Tensor]:
        positive = self.cfg.data.history == "positive"
        return [
            self.event(piece, i)
            for i in range(piece.item_ids.size)
            if piece.timestamps[i] < piece.timestamps[target] and (not positive or piece.labels[i] == 1)
        ]

    def logit(self, piece: Piece, target: int) -> Tensor:
        item, request = self.item(int(piece.item_ids[target])), self.request(piece, target)
        late = self.model.fusion == "late"
        query = request + (self.model.user_token if late else item)
        row = torch.stack([*self.history(piece, target), query])
        user = self.user(inputs_embeds=row[None]).last_hidden_state[0, -1]
        return self.model.head(user[None], item[None])[0] if late else self.model.head(user[None])[0]
