"""Prediction head: maps the User LLM's output to one logit per exposure (figure 2 of the HLLM paper).

Legend: Q exposures (queries), D width, F columns of evidence.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.fusion import Fusion
from hllm_torchrec.modules.precision import widen


class PredictionHead(nn.Module):
    """Logits for the exposures of a batch, x of Eq. (2).

    - Early fusion: the query token is the target item, so its output already combines user and target:
      logit = MLP(LN(query)).
    - Late fusion: the user embedding u (output of the [USER] query) is combined with the target's item embedding e
      only here: logit = MLP([u, e, u * e]) + scale * mean(u * e), with u and e layer-normalized first. The mean is
      the dot product divided by D: initially a cosine, so at most 1 for any width. The scale is learned (shape [1],
      initially 1).

    The layer norms make the head independent of the size of an LLM's hidden states (a few dimensions of a pretrained
    LLM are tens of times larger than the rest, and their products hundreds). The last layer and the dot product run
    in float32 also under autocast: bfloat16 logits have 8 significant bits, and the resulting ties change the AUC.
    """

    def __init__(
        self,
        width: int,
        hidden: int | Sequence[int],
        dropout: float = 0.0,
        fusion: str = Fusion.LATE,
        evidence: int = 0,
    ) -> None:
        """Build the head.

        Args:
            width: D of the query outputs, and of the item embeddings in late fusion.
            hidden: width of the MLP's hidden layer, or widths of several; an empty sequence makes a linear head.
            dropout: probability after each hidden layer's SiLU.
            fusion: "early" or "late".
            evidence: F, number of evidence columns per exposure (0: none).

        Raises:
            ValueError: `fusion` is not "early" or "late".
        """
        super().__init__()
        if fusion not in (Fusion.EARLY, Fusion.LATE):
            raise ValueError(f"fusion is {str(fusion)!r}: must be 'early' or 'late'")
        self.fusion = Fusion(fusion)
        # Early fusion reads the query; late fusion reads [u, e, u * e].
        widths = [width if self.fusion.query_is_target else 3 * width]
        widths += [hidden] if isinstance(hidden, int) else list(hidden)
        self.user_norm = nn.LayerNorm(width)
        if self.fusion.query_is_user:
            self.item_norm = nn.LayerNorm(width)
            self.dot_scale = nn.Parameter(torch.empty(1))
        layers: list[nn.Module] = []
        for n_in, n_out in zip(widths, widths[1:]):
            layers += [nn.Linear(n_in, n_out), nn.SiLU(), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1], 1)
        # Wide and deep: evidence adds a linear term to the logit, and a projection of it is added to the query.
        self.wide = nn.Linear(evidence, 1) if evidence else None
        self.read_evidence = nn.Linear(evidence, width, bias=False) if evidence else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale of the dot product to 1 and the linear term to 0; submodules have `reset_parameters` of their
        own."""
        if self.fusion.query_is_user:
            nn.init.ones_(self.dot_scale)
        if self.wide is not None:
            nn.init.zeros_(self.wide.weight)
            nn.init.zeros_(self.wide.bias)

    def forward(self, query: Tensor, item: Tensor | None = None, evidence: Tensor | None = None) -> Tensor:
        """Return logits [Q], at least float32.

        Args:
            query: [Q, D], the User LLM's output at the exposures' queries (late fusion: the user embedding,
                repeated for each exposure of the request).
            item: [Q, D], the target's item embedding; late fusion only.
            evidence: [Q, F] of the exposures if the head was built with evidence, else None.

        Raises:
            ValueError: an item is given in early fusion, or no item in late fusion.
        """
        if (item is not None) != self.fusion.query_is_user:
            given = "an item embedding" if item is not None else "no item embedding"
            raise ValueError(
                f"the {self.fusion} fusion head was given {given}: early fusion takes the query's output "
                "alone, late fusion the user's output and the target's item embedding"
            )
        if self.wide is None or self.read_evidence is None:
            return self._combine(query, item)
        assert evidence is not None, "the head was built for evidence"
        logits = self._combine(query + self.read_evidence(evidence), item)
        with torch.autocast(device_type=query.device.type, enabled=False):
            return logits + self.wide(widen(evidence)).squeeze(-1)

    def _combine(self, query: Tensor, item: Tensor | None) -> Tensor:
        """Logits [Q] without the linear term of evidence."""
        user = self.user_norm(query)
        if item is None:
            return self._score(user)
        target = self.item_norm(item)
        product = user * target
        with torch.autocast(device_type=query.device.type, enabled=False):
            # In float32 without autocast, see the class docstring.
            dot = self.dot_scale * widen(product).mean(dim=-1)
        return self._score(torch.cat((user, target, product), dim=-1)) + dot

    @torch.no_grad()
    def initialize_bias(self, base_rate: float) -> None:
        """Set the last bias to the logit of the base rate, log(p / (1 - p)).

        Training then starts at about the log loss of the constant predictor, and does not spend its first steps on
        learning the bias.

        Args:
            base_rate: share of positive labels among the training exposures, in (0, 1).

        Raises:
            ValueError: the base rate is not in (0, 1); labels of one class cannot train a classifier.
        """
        if not 0.0 < base_rate < 1.0:
            raise ValueError(
                f"base rate is {base_rate}: must be between 0 and 1. Labels of one class only cannot train "
                "the classification loss: check the label rule, or train the generative loss alone"
            )
        self.out.bias.fill_(math.log(base_rate / (1.0 - base_rate)))

    @torch.no_grad()
    def initialize_evidence(self, weights: Tensor, bias: float) -> None:
        """Make the logit equal to a logistic regression on evidence alone, with weights [F] and bias; the network then
        adds exactly 0 to it."""
        assert self.wide is not None
        self.wide.weight.copy_(weights[None])
        self.wide.bias.fill_(bias)
        self.out.weight.zero_()
        self.out.bias.zero_()
        if self.fusion.query_is_user:
            self.dot_scale.zero_()

    def _score(self, features: Tensor) -> Tensor:
        """Run the MLP on [Q, n] and its last layer in at least float32: [Q]."""
        hidden = self.mlp(features)
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return F.linear(widen(hidden), widen(self.out.weight), widen(self.out.bias)).squeeze(-1)
