"""`HLLMOutput`: losses and predictions of a forward pass of HLLM.

Legend: X exposures, O outputs of all tasks, U unique items, D user width, E item width, V width of the item vectors
with which a prediction is compared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hllm_torchrec.models.creative_head import CreativeLosses
from hllm_torchrec.modules.losses.objectives import InfoNceOutput
from hllm_torchrec.modules.losses.task_losses import TaskLoss


@dataclass
class HLLMOutput:
    """Output of a step. Losses are sums, not means, because ranks hold different numbers of exposures.

    logits: [X] of the first label (empty without queries); outputs: [X, O] of all tasks; None without queries, or if
    the head has one logit (`is_single`); tasks: task name -> loss; value_error: [] weighted sum of squared errors of
    the auxiliary value head, or None; generative: the sums of the generative loss, or None; next_items: [X, V]
    predicted next item of every exposure, or None; items: detached item vectors, [U, D] if the generative loss compares
    items in the space "features", else the Item LLM's embeddings [U, E] or None; creative: losses of a batch of
    creatives, or None.
    """

    logits: Tensor
    outputs: Tensor | None
    tasks: dict[str, TaskLoss]
    value_error: Tensor | None
    generative: InfoNceOutput | None
    next_items: Tensor | None
    items: Tensor | None
    creative: CreativeLosses | None = None

    @property
    def classification(self) -> Tensor:
        """[] sum of the minimized losses of all tasks, each with weight 1."""
        terms = [loss.trained for loss in self.tasks.values()]
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum()
