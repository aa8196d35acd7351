"""The evidence features of a run (`data.evidence`: values that simple predictors compute for an exposure).

The features are fitted when training starts; groups that use texts read the embeddings of the frozen Item LLM.
"""

from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hllm_torchrec.common.arrays import Floats
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.evidence import TEXT_GROUPS, Evidence, EvidenceModel
from hllm_torchrec.data.evidence_fit import fit_evidence
from hllm_torchrec.data.item_statistics import ItemStatistics
from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import LiveItems

EVIDENCE_KEY = "evidence"
"""Key of the fingerprint of the run's evidence in a checkpoint's `extra.json`."""


def open_evidence(
    config: Config,
    dataset: Dataset,
    catalogue: Tensor | None,
    fitted: EvidenceModel | None,
) -> Evidence | None:
    """The evidence of a configuration, fitted by rank 0 if `fitted` is None; None without `data.evidence`. Collective.

    catalogue: [N, E] text embeddings of the frozen Item LLM (`frozen_catalogue`); None: no group uses texts, or
    `read_catalogue` adds the texts later.
    """
    names, delay = config.data.evidence, config.data.feedback_delay
    if not names:
        return None
    text: Floats | None = None
    if catalogue is not None and reads_texts(config):
        text = catalogue.float().cpu().numpy().astype(np.float32, copy=False)
    saved = fitted or run_on_rank_zero(lambda: fit_evidence(dataset, names, text, delay))
    return Evidence(names, saved, ItemStatistics.of_dataset(dataset), dataset.action_values, text, delay)


def reads_texts(config: Config) -> bool:
    """True if the configured evidence uses the texts of items."""
    return config.item_llm.enabled and not TEXT_GROUPS.isdisjoint(config.data.evidence)


def frozen_catalogue(model: HLLM, encoder: ItemEncoder | None, live: LiveItems | None, device: torch.device) -> Tensor:
    """Text embeddings [N, E] of the catalogue by the frozen Item LLM; `model` must not be wrapped yet. Collective."""
    assert model.item_llm is not None and encoder is not None and live is not None
    model.item_llm.to(device)
    embed = partial(model.embed_items, source=live)
    return encoder.encode_catalogue(live.item_llm, embed, show=dist.get_rank() == 0)
