"""A user's tastes: Bayesian regression of the residuals of visible events on descriptors of their items.

    residual(u, i) = z_u . d_i + noise,   z_u ~ N(0, I),   noise ~ N(0, s^2)

Descriptors d of an event are its item's loadings in the linear-Gaussian model (`item_factors`), the first principal
components of its text embedding, and its popularity and mean value before the event's second. Rare items have loadings
close to the prior's mean; their texts make them distinguishable.

Legend: n events of one user, X exposures, E width of text embeddings, P components, J descriptors.
"""

import numpy as np

from hllm_torchrec.common.arrays import AnyFloats, Doubles, Floats, Ints

COMPONENTS = 16
"""P, number of principal components of the texts."""
TEXT_SCALE, STATISTICS_SCALE = 0.25, 0.2
"""Prior standard deviations, in standard deviations of the values, of the effect of a typical text, and of the effect
of one standard deviation of popularity or of the mean value."""
_SOLVED_AT_ONCE = 1024


def principal_components(unit: Floats) -> Doubles:
    """[E, P] projection of unit text embeddings [N, E] (row 0 unknown) to their first principal components.

    It is scaled so that the mean squared norm of the projected texts is 1.
    """
    known = unit[1:].astype(np.float64)
    values, vectors = np.linalg.eigh(known.T @ known)
    first = vectors[:, ::-1][:, :COMPONENTS]
    variance = float(np.maximum(values[::-1][:COMPONENTS], 0).sum()) / max(len(known), 1)
    projection: Doubles = first / np.sqrt(max(variance, 1e-12))
    return projection


def posterior_tastes(past: Doubles, residuals: AnyFloats, seen: Ints, noise: float) -> Doubles:
    """[X, J] E[z | the first seen[x] events]; zeros without events.

    past: descriptors [n, J] of the user's events; residuals: [n]; noise: s^2.
    """
    width = past.shape[1]
    counts, which = np.unique(seen, return_inverse=True)
    starts = np.concatenate([[0], counts[:-1]])
    precision, weighted = np.eye(width), np.zeros(width)
    z = np.empty((counts.size, width))
    for first in range(0, counts.size, _SOLVED_AT_ONCE):
        block = slice(first, first + _SOLVED_AT_ONCE)
        left, right = np.empty((z[block].shape[0], width, width)), np.empty((z[block].shape[0], width, 1))
        for row, (start, end) in enumerate(zip(starts[block], counts[block], strict=True)):
            some = past[start:end]
            precision = precision + some.T @ some / noise
            weighted = weighted + some.T @ residuals[start:end] / noise
            left[row], right[row, :, 0] = precision, weighted
        z[block] = np.linalg.solve(left, right)[..., 0]
    return z[which]
