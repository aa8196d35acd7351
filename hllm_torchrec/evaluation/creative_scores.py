"""Likelihoods of personalized texts given the right user, an unknown user, another user, or a given vector.

    gap = nll(null) - nll(right)          gain by knowing the user, in nats per creative

right: the creative's own user vector; null: the learned tokens for unknown users; shuffled: another user's vector.
nll(shuffled) - nll(right) overstates the gain, because it also includes the cost of confident wrong predictions.

Legend: N creatives of a part, n creatives that are scored, D width of a user vector, A actions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.common.arrays import Doubles, Ints
from hllm_torchrec.data.creative_loader import CreativeLoader
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.distributed.collectives import all_gather_variable
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.parallelize import autocast
from hllm_torchrec.modules.creative.creative_llm import PackedTexts

TextsOf = Callable[[Ints], PackedTexts]
"""Function of indices [n] that returns texts."""
PER_BATCH = 64
"""Number of creatives per rank and step."""
MEASURED = 4096
"""Approximate number of creatives, on all ranks together, whose user vectors `measure_user_vectors` computes."""
SAMPLED_GROUPS = 32
"""Maximum number of the training part's row groups in which `likes_by_action` counts."""
CONDITIONS = ("right", "null", "shuffled")


@dataclass(frozen=True)
class CreativeVectors:
    """User vectors of the creatives of a part, the same on every rank.

    vectors: float32 [N, D]; known: bool [N], False if the creative sees no event; user_ids: int64 [N]; steps: indices
    of this rank's creatives in each step.
    """

    loader: CreativeLoader
    vectors: Tensor
    known: NDArray[np.bool_]
    user_ids: Ints
    steps: list[Ints]


@dataclass(frozen=True)
class CreativeScores:
    """Scores of creatives of a part, the same on every rank.

    rows: int64 [n] rows of the part; user_ids: int64 [n]; tokens: int64 [n] number of tokens of the response; nll:
    condition -> float64 [n] negative log-likelihoods in nats.
    """

    rows: Ints
    user_ids: Ints
    tokens: Ints
    nll: dict[str, Doubles]


@contextmanager
def _evaluating(experiment: Experiment) -> Iterator[None]:
    was_training = experiment.hllm.training
    experiment.hllm.eval()
    try:
        with torch.no_grad(), experiment.evaluation_items():
            yield
    finally:
        experiment.hllm.train(was_training)


def creative_vectors(experiment: Experiment, split: str) -> CreativeVectors:
    """Compute the user vector of each creative of a part, from events of strictly earlier seconds. Collective.

    For a creative without a timestamp, the vector is computed from all events of the user.
    """
    loader, hllm = experiment.creative_loader(split, PER_BATCH), experiment.hllm
    found, steps = [], []
    # place: row of the part -> index of the creative. Each rank computes other creatives, in the loader's order. The
    # index is gathered with the vector, as float64, which represents it exactly; the rows are then sorted by it.
    place = np.empty(len(loader.part), np.int64)
    place[loader.tokens.rows] = np.arange(len(loader))
    with _evaluating(experiment):
        for batch in loader.batches(0):
            assert batch.creative is not None and batch.request_query is not None
            on_device = batch.to(experiment.device)
            assert on_device.request_query is not None
            with autocast(experiment.config, experiment.device):
                vectors = hllm.embed_users(on_device)[on_device.request_query].float().cpu()
            index = place[batch.creative.rows.numpy()]
            known = batch.query_visible[batch.request_query] > 0
            steps.append(index)
            found.append(torch.cat([torch.from_numpy(index)[:, None].double(), known[:, None].double(), vectors], 1))
    gathered = all_gather_variable(torch.cat(found).to(experiment.device)).cpu()
    gathered = gathered[gathered[:, 0].argsort()]
    users = loader.part.user_ids[loader.tokens.rows]
    return CreativeVectors(loader, gathered[:, 2:].float(), gathered[:, 1].bool().numpy(), users, steps)


def measure_user_vectors(experiment: Experiment) -> dict[str, float]:
    """Fit the normalization of user vectors on random creatives of the training part. Collective.

    Also measures the statistics of `HLLM.liked_texts`, if the model has it.

    Returns:
        `length`, the mean L2 norm of user vectors, and `common`, the L2 norm of their mean.
    """
    loader, hllm = experiment.creative_loader("train", PER_BATCH, training=True), experiment.hllm
    assert hllm.creative_head is not None
    steps, found = -(-MEASURED // (PER_BATCH * loader.world_size)), []
    if hllm.liked_texts is not None:
        hllm.liked_texts.measure(*likes_by_action(loader.dataset, hllm.liked_texts.shares.numel()))
    with _evaluating(experiment), closing(loader.batches(0)) as batches:
        for batch in islice(batches, steps):
            on_device = batch.to(experiment.device)
            assert on_device.request_query is not None
            with autocast(experiment.config, experiment.device):
                found.append(hllm.embed_users(on_device)[on_device.request_query].float())
    users = all_gather_variable(torch.cat(found))
    hllm.creative_head.measure(users)
    return {"length": users.norm(dim=1).mean().item(), "common": users.mean(0).norm().item()}


def likes_by_action(dataset: Dataset, actions: int) -> tuple[Tensor, Tensor]:
    """Count positive labels and labeled events by action, [A] each, in a sample of the training part's row groups."""
    groups = dataset.row_groups("train")
    sample = groups[:: -(-len(groups) // SAMPLED_GROUPS)]
    events = dataset.sequences(sample, ["labels", "actions"])
    known = ~np.isnan(events.labels)
    positive, labeled = (
        torch.from_numpy(np.bincount(events.actions[chosen], minlength=actions)[:actions].astype(np.float64))
        for chosen in (known & (events.labels > 0.5), known)
    )
    return positive, labeled


def score_creatives(
    experiment: Experiment,
    split: str,
    conditions: Sequence[str] = CONDITIONS,
    given: Mapping[str, Tensor] | None = None,
    vectors: CreativeVectors | None = None,
    most: int = 0,
) -> CreativeScores:
    """Score the creatives of a part under each condition. Collective.

    Args:
        conditions: some of `CONDITIONS`.
        given: further conditions: name -> vectors [N, D], such as centers of clusters. They replace the vectors of
            users who have an earlier event.
        vectors: result of `creative_vectors`; None: computed here.
        most: maximum number of creatives to score, spaced evenly in the part; 0: all.
    """
    vectors = vectors or creative_vectors(experiment, split)
    chosen = np.arange(len(vectors.loader))
    if 0 < most < chosen.size:
        chosen = np.linspace(0, chosen.size - 1, most).astype(np.int64)
    steps = [index[np.isin(index, chosen)] for index in vectors.steps]
    loader, known = vectors.loader, torch.from_numpy(vectors.known)
    named: dict[str, tuple[Tensor, Tensor]] = {
        "right": (vectors.vectors, ~known),
        "null": (vectors.vectors, torch.ones_like(known)),
    }
    if "shuffled" in conditions:
        donor = torch.from_numpy(other_users(vectors.user_ids))
        named["shuffled"] = (vectors.vectors[donor], ~known[donor])
    named |= {name: (those, ~known) for name, those in (given or {}).items()}
    wanted = [*conditions, *(given or {})]
    nll: dict[str, Doubles] = {}
    for name in wanted:
        values = score_vectors(experiment, steps, *named[name], loader.tokens.gather)
        nll[name] = _gathered(values, steps, experiment.device, len(loader))[chosen]
    tokens = np.asarray(loader.tokens.lengths - loader.tokens.response_from)
    return CreativeScores(np.asarray(loader.tokens.rows)[chosen], vectors.user_ids[chosen], tokens[chosen], nll)


def score_vectors(
    experiment: Experiment, steps: Sequence[Ints], vectors: Tensor, is_null: Tensor, texts: TextsOf
) -> list[Tensor]:
    """Return the negative log-likelihoods of the texts of each step given vectors [N, D]. Collective.

    is_null: [N] bool, the null tokens replace the vector; texts: function of indices [n] that returns the texts.
    """
    found = []
    with _evaluating(experiment):
        for index in steps:
            at = torch.from_numpy(index)
            packed = texts(index).map(lambda x: x.to(experiment.device))
            with autocast(experiment.config, experiment.device):
                users, null = vectors[at].to(experiment.device), is_null[at].to(experiment.device)
                found.append(experiment.hllm.score_texts(users, null, packed).double().cpu())
    return found


def _gathered(values: list[Tensor], steps: Sequence[Ints], device: torch.device, number: int) -> Doubles:
    """Gather the values of all ranks, [N], in the order of the creatives; NaN for creatives that were not scored."""
    index = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *steps])).double()
    both = torch.stack([index, torch.cat([torch.empty(0, dtype=torch.float64), *values])], 1)
    rows = all_gather_variable(both.to(device)).cpu().numpy()
    found = np.full(number, np.nan)
    found[rows[:, 0].astype(np.int64)] = rows[:, 1]
    return found


def other_users(user_ids: Ints) -> Ints:
    """Draw for each creative a random creative of another user; returns indices [N].

    The other user is the next one in a random circular order of the users. If there is only one user, the drawn
    creative is one of the same user.
    """
    rng = np.random.default_rng(0)
    users, inverse = np.unique(user_ids, return_inverse=True)
    circle = rng.permutation(users.size)
    following = np.empty_like(circle)
    following[circle] = np.roll(circle, -1)
    order = np.argsort(inverse, kind="stable")
    counts = np.bincount(inverse, minlength=users.size)
    first = np.cumsum(counts) - counts
    donors = following[inverse]
    chosen: Ints = order[first[donors] + (rng.random(inverse.size) * counts[donors]).astype(np.int64)]
    return chosen


def creative_metrics(scores: CreativeScores) -> dict[str, float]:
    """Return means for the log, in nats per creative and per token; `creative_gap` = null - right."""
    tokens = max(1, int(scores.tokens.sum()))
    found: dict[str, float] = {"creative_rows": scores.rows.size}
    for name, values in scores.nll.items():
        suffix = "" if name == "right" else f"_{name}"
        found[f"creative_nll{suffix}"] = float(values.mean())
    found["creative_nll_per_token"] = float(scores.nll["right"].sum() / tokens)
    if "null" in scores.nll:
        found["creative_gap"] = found["creative_nll_null"] - found["creative_nll"]
    return found
