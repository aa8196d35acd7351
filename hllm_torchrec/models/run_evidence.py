"""Evidence of a run: fitted when its training starts, with the text embeddings of the frozen Item LLM."""

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
    model: HLLM,
    encoder: ItemEncoder | None,
    live: LiveItems | None,
    fitted: EvidenceModel | None,
    device: torch.device,
) -> tuple[Evidence | None, Tensor | None]:
    """The evidence that a configuration names, fitted by rank 0 if `fitted` is None; None if it names none. Collective.

    Also the text embeddings [N, E] that it compares, which are those of the frozen Item LLM; None if it compares none.

    model: not yet wrapped; its Item LLM, which is frozen, encodes the catalogue.
    """
    names, delay = config.data.evidence, config.data.feedback_delay
    if not names:
        return None, None
    text: Floats | None = None
    catalogue: Tensor | None = None
    if model.item_llm is not None and not set(names).isdisjoint(TEXT_GROUPS):
        assert encoder is not None and live is not None
        model.item_llm.to(device)
        embed = partial(model.embed_items, source=live)
        catalogue = encoder.encode_catalogue(live.item_llm, embed, show=dist.get_rank() == 0)
        text = catalogue.float().cpu().numpy().astype(np.float32, copy=False)
    saved = fitted or run_on_rank_zero(lambda: fit_evidence(dataset, names, text, delay))
    return Evidence(names, saved, ItemStatistics.of_dataset(dataset), dataset.action_values, text, delay), catalogue
