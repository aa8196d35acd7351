"""`SoftPrompt`: a user vector as soft tokens of a language model (HLLM-Creator's W U: projection W, user vector U).

Legend: N creatives, D width of a user vector, C width of the language model, k soft tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.features.standardize import Standardize, Whiten

NORMALIZERS: dict[str, type[Standardize | Whiten]] = {"standardize": Standardize, "whiten": Whiten}


class SoftPrompt(nn.Module):
    """users [N, D] -> soft tokens [N, k, C]; a learned vector stands for an unknown user.

    Tokens are RMS-normalized and multiplied by a learned gain, which starts at `scale`, the RMS of the model's word
    vectors: without this, torch's default initialization makes them several times as large as a word vector, and with
    trained user vectors their size is arbitrary.

    User vectors of a trained encoder are nearly parallel (a mean cosine of 0.7 on MovieLens), so that tokens of all
    users would be nearly the same. With `normalize` what is common to them is subtracted, and a token is the unknown
    user's plus what is special about this one, of the same size on average: a user like all others is as an unknown
    one. (RMS-normalized, a small difference would be as large as a large one, and its gradient without bounds.)

    Args:
        user_width, width: D and C.
        tokens: k.
        hidden: width of an MLP's hidden layer; 0: one linear layer without bias, as published.
        scale: initial gain; None: no RMS normalization and no gain, as published.
        normalize: standardize, whiten (`modules.features.standardize`) or none: users are read as they are.
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
        # Of shape [1], as FSDP2 refuses parameters without dimensions.
        self.gain = None if scale is None else nn.Parameter(torch.full((1,), scale))
        self.null = nn.Parameter(torch.randn(tokens, width) * (0.02 if scale is None else scale))

    def forward(self, users: Tensor, is_null: Tensor) -> Tensor:
        """users [N, D], is_null [N] bool (an unknown user: `users` is not read) -> [N, k, C]."""
        if self.normalize is not None:
            # |y| is about 1, and torch initializes the weights of a layer with a variance of 1 / (3 D).
            size = 1.0 if self.gain is None else self.gain * (3 * users.shape[-1]) ** 0.5
            special = self.project(self.normalize(users)).unflatten(-1, (self.tokens, self.width)) * size
            return self.null.to(special.dtype) + special.masked_fill(is_null[:, None, None], 0.0)
        soft = self.project(users).unflatten(-1, (self.tokens, self.width))
        if self.gain is not None:
            soft = F.rms_norm(soft.float(), (self.width,), eps=1e-6) * self.gain
        return torch.where(is_null[:, None, None], self.null.to(soft.dtype), soft)
