"""Is the discriminator a useful teacher? What each step tells of it.

N responses of a step; a score is D's probability that the student wrote the response.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 10  # of the calibration error


def accuracy(scores: Tensor, labels: Tensor) -> float:  # (N,), (N,) bool, True for the student's
    """The share of right guesses; exactly 1/2 is a guess for the teacher, as in the similarity reward."""
    return float(((scores > 0.5) == labels).double().mean())


def auc(scores: Tensor, labels: Tensor) -> float:  # (N,), (N,) bool
    """How often a student's response has a higher score than a teacher's, ties counted half; nan with one side only."""
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[place].double()  # from 1, the mean of those of equal scores
    students, teachers = labels.sum(), (~labels).sum()
    return float((rank[labels].sum() - students * (students + 1) / 2) / (students * teachers))


def calibration_error(scores: Tensor, labels: Tensor) -> float:  # (N,), (N,) bool
    """Expected calibration error: |mean score - share of the student's| over 10 bins of the score, by their size."""
    bins = (scores * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, scores.double() - labels.double())
    return float(gap.abs().sum() / len(scores))


def explained_by_length(values: Tensor, lengths: Tensor) -> float:  # (N,), (N,)
    """R^2 of the least-squares fit of `values` by length and its square; 0 where values or lengths are all equal.

    The square lets a preferred length in between count. By chance alone it is 2 / (N - 1) on average.
    """
    values, lengths = values.double(), lengths.double()
    spread = (values - values.mean()).square().sum()
    if values.max() == values.min() or lengths.max() == lengths.min():
        return 0.0
    place = (lengths - lengths.mean()) / lengths.std()
    design = torch.stack([torch.ones_like(place), place, place.square()], dim=1)
    left = values - design @ (torch.linalg.pinv(design) @ values)
    return float((1 - left.square().sum() / spread).clamp(0, 1))


def health(
    before: Tensor,  # (N,) scores before this step's update: of responses that D was not trained on
    scores: Tensor,  # (N,) scores after it
    rewards: Tensor,  # (N,) similarity rewards
    sources: list[str],  # "student" or a teacher's name
    lengths: Tensor,  # (N,) tokens
) -> dict[str, float]:
    """The metrics of one step, over all of its responses."""
    labels = torch.tensor([source == "student" for source in sources])
    out = {
        "discriminator/accuracy": accuracy(before, labels),
        "discriminator/auc": auc(before, labels),
        "discriminator/calibration_error": calibration_error(before, labels),
        "discriminator/score_by_length": explained_by_length(scores, lengths),
        "reward/similarity_by_length": explained_by_length(rewards, lengths),
    }
    for side, some in (("student", labels), ("teacher", ~labels)):
        out[f"discriminator/{side}_score"] = float(scores[some].double().mean())
        out[f"reward/{side}_similarity"] = float(rewards[some].double().mean())
    for name in sorted(set(sources) - {"student"}):
        some = torch.tensor([source == name for source in sources])
        out[f"discriminator/score/{name}"] = float(scores[some].double().mean())
        out[f"reward/similarity/{name}"] = float(rewards[some].double().mean())
    return out
