"""What the codebooks learned: principal components of the code vectors, and their norms.

Shapes: K latent variables, each with a codebook of C codes of D dimensions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dvq import DvqError
from dvq.disk import Arrays

Floats = NDArray[np.float64]

CONSTANT = 1e-12
"""Variance, relative to the mean squared norm, below which all codes of a codebook count as equal: what is left is
the rounding of float32."""


@dataclass(frozen=True)
class Analysis(Arrays):
    """The codebooks of one trial; what :func:`analyze` returns."""

    explained: Floats
    """(K, D + 1): [k, n] is the fraction of codebook k's variance in its first n principal components"""
    explained_weighted: Floats
    """(K, D + 1): the same with each code weighted by how often it was used, so dead codes do not count"""
    projections: Floats
    """(K, C, 3): the codes on the first three principal components of all codes [units of the codes]"""
    norms: Floats
    """(K, C): ‖M[k, c]‖ [units of the codes]"""
    usage: NDArray[np.int64]
    """(K, C): how often each code was chosen over a whole pass"""

    def summary(self) -> dict[str, Any]:
        """The numbers that go into ``results.json``: components for 95% of the variance of each codebook and
        on average, the mean fraction in the first three, and the mean norm of a code."""
        all_codes, weighted = components(self.explained), components(self.explained_weighted)
        three = min(3, self.explained.shape[1] - 1)
        return {
            "components_95": all_codes.tolist(),
            "components_95_weighted": weighted.tolist(),
            "components_95_mean": float(all_codes.mean()),
            "components_95_weighted_mean": float(weighted.mean()),
            "explained_by_3_mean": float(self.explained[:, three].mean()),
            "explained_by_3_weighted_mean": float(self.explained_weighted[:, three].mean()),
            "norm_mean": float(self.norms.mean()),
        }


def components(explained: Floats, fraction: float = 0.95) -> NDArray[np.int64]:
    """(K,): the fewest principal components that hold ``fraction`` of the variance; 0 if there is no variance."""
    first: NDArray[np.int64] = (explained >= fraction).argmax(axis=1)
    return first


def analyze(codebook: ArrayLike, usage: ArrayLike | None = None) -> Analysis:
    """Principal components of each codebook.

    With weights w (all 1/C, or usage over its sum) and μ = Σ w_c m_c, they are the eigenvectors of
    Σ w_c (m_c − μ)(m_c − μ)ᵀ, and the eigenvalues are the variances that they explain. An eigenvector's sign
    is such that its entry of largest magnitude is positive. A codebook without variance (all codes the same,
    or one used code) needs no component: its explained variance is 1 from n = 0 on.

    Args:
        codebook: (K, C, D), finite.
        usage: (K, C) counts with at least one used code in each row; None if all count the same.

    Raises:
        DvqError: the codebook is not finite.
        ValueError: the shapes do not fit, or a row of counts is negative or sums to 0.
    """
    detached = codebook.detach().cpu() if hasattr(codebook, "detach") else codebook  # of a parameter
    codes = np.asarray(detached, dtype=np.float64)
    if codes.ndim != 3:
        raise ValueError(f"codebook: expected (K, C, D), found {codes.shape}")
    counts = np.ones(codes.shape[:2], np.int64) if usage is None else np.asarray(usage, np.int64)
    if counts.shape != codes.shape[:2]:
        raise ValueError(f"usage: expected {codes.shape[:2]}, found {counts.shape}")
    totals = counts.sum(axis=1, keepdims=True)
    if (counts < 0).any() or (totals == 0).any():
        raise ValueError("usage: expected counts with at least one used code in each codebook")
    if not np.isfinite(codes).all():
        raise DvqError("the codebooks hold NaN or infinity: training diverged; lower learning_rate")
    explained, vectors = _principal(codes, np.full(counts.shape, 1 / counts.shape[1]))
    explained_weighted, _ = _principal(codes, counts / totals)
    projections = np.zeros((*codes.shape[:2], 3))
    first = vectors[..., :3]  # (K, D, 3), or fewer where D is smaller
    projections[..., : first.shape[-1]] = (codes - codes.mean(axis=1, keepdims=True)) @ first
    return Analysis(explained, explained_weighted, projections, np.linalg.norm(codes, axis=-1), counts)


def _principal(codes: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Explained variance (K, D + 1), and the principal components (K, D, D) in columns, for the codes
    (K, C, D) with weights (K, C) that sum to 1."""
    mean = weights[:, None] @ codes  # (K, 1, D)
    scaled = np.sqrt(weights)[..., None] * (codes - mean)
    values, vectors = np.linalg.eigh(scaled.mT @ scaled)  # ascending
    values, vectors = values[:, ::-1].clip(min=0), vectors[..., ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1, keepdims=True), axis=1)
    cumulative = np.pad(values.cumsum(axis=1), ((0, 0), (1, 0)))
    total = cumulative[:, -1:]
    size = (weights * np.square(codes).sum(axis=-1)).sum(axis=1, keepdims=True)
    constant = total <= CONSTANT * size
    explained = np.where(constant, 1.0, cumulative / np.where(constant, 1.0, total))
    return explained, vectors * np.where(largest < 0, -1, 1)
