"""`SoftPrompt`: projects a user vector to soft tokens of a language model (W U of HLLM-Creator, arXiv 2508.18118).

Legend: N creatives, D width of a user vector, C width of the language model, k soft tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.features.standardize import Standardize, Whiten

NORMALIZERS: dict[str, type[Standardize | Whiten]] = {"standardize": Standardize, "whiten": Whiten}


class SoftPrompt(nn.Module):
    """users [N, D] -> soft tokens [N, k, C]; learned tokens (null) represent an unknown user.

    Without `normalize`: W U is RMS-normalized and multiplied by a learned gain, which is initialized to `scale`, the
    RMS of the model's word embeddings. Without this, soft tokens would be several times as large as word embeddings
    with torch's default initialization, and of arbitrary size with trained user vectors.

    With `normalize`: null + gain c W y (without `scale`: null + W y), where y is the normalized user vector and c =
    sqrt(3 D) makes the second term as large as a word embedding at initialization. Reason: user vectors of a trained
    encoder are nearly parallel (mean cosine 0.7 on MovieLens), so that W U would be nearly the same for all users. The
    normalization subtracts the mean user vector, and the average user gets the tokens of an unknown user. The second
    term is not RMS-normalized: this would scale small and large differences from the mean to the same size, with
    unbounded gradients near the mean.

    Args:
        user_width, width: D and C.
        tokens: k.
        hidden: width of the hidden layer of an MLP in place of W; 0: one linear layer without bias, as published.
        scale: initial gain; None: no RMS normalization and no gain, as published.
        normalize: "standardize" or "whiten" (see `modules.features.standardize`), or "none".
    """

    def __init__(
        self,
        user_width: int,
        width: int,
        tokens: int = 1,
        hidden: int = 0,
        scale: float | None = None,
        normalize: str = "none",
    ) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        self.normalize = None if normalize == "none" else NORMALIZERS[normalize](user_width)
        self.project: nn.Module = nn.Linear(user_width, tokens * width, bias=False)
        if hidden:
            self.project = nn.Sequential(
                nn.Linear(user_width, hidden), nn.SiLU(), nn.Linear(hidden, tokens * width, bias=False)
            )
        # Shape [1], because FSDP2 refuses 0-d parameters.
        self.gain = None if scale is None else nn.Parameter(torch.full((1,), scale))
        self.null = nn.Parameter(torch.randn(tokens, width) * (0.02 if scale is None else scale))

    def forward(self, users: Tensor, is_null: Tensor) -> Tensor:
        """Map users [N, D] to soft tokens [N, k, C]; where is_null [N] (bool), to the null tokens."""
        if self.normalize is not None:
            # |y| is about 1, and torch's initialization gives the weights of a linear layer the variance 1 / (3 D), so
            # the entries of W y have a standard deviation of about 1 / sqrt(3 D).
            size = 1.0 if self.gain is None else self.gain * (3 * users.shape[-1]) ** 0.5
            special = self.project(self.normalize(users)).unflatten(-1, (self.tokens, self.width)) * size
            return self.null.to(special.dtype) + special.masked_fill(is_null[:, None, None], 0.0)
        soft = self.project(users).unflatten(-1, (self.tokens, self.width))
        if self.gain is not None:
            soft = F.rms_norm(soft.float(), (self.width,), eps=1e-6) * self.gain
        return torch.where(is_null[:, None, None], self.null.to(soft.dtype), soft)
