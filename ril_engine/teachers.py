"""How the G teacher responses of a question are divided among several teachers. All counts are of one question."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import torch

from ril_engine.config import Config


def weights_of(config: Config) -> dict[str, Fraction]:
    """Teacher -> weight, as it is written in the config: 0.1 is a tenth, not the float next to it."""
    return {each.name: Fraction(str(each.weight)) for each in config.teachers}


def _shares(count: int, weights: dict[str, Fraction]) -> dict[str, Fraction]:
    total = sum(weights.values())
    return {name: count * weight / total for name, weight in weights.items()}


def divide(
    count: int, weights: dict[str, Fraction], available: dict[str, int], generator: torch.Generator
) -> dict[str, int]:
    """How many of `count` responses each teacher gives, in random order of the teachers.

    Each gives floor or ceil of its share by weight; who gives the odd ones is drawn so that the mean over many
    questions is the share. None gives more than it has `available`: the rest is divided among the others. The counts
    add up to `count` where so many are available.
    """
    names = list(weights)
    order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    shares = _shares(count, weights)
    remainders = {name: shares[name] % 1 for name in order}
    odd = _drawn({name: remainder for name, remainder in remainders.items() if remainder}, generator)
    counts = {name: min(floor(shares[name]) + (name in odd), available[name]) for name in order}
    left = {name: available[name] - counts[name] for name in order if available[name] > counts[name]}
    rest = count - sum(counts.values())
    if rest and left:
        more = divide(rest, {name: weights[name] for name in left}, left, generator)
        counts = {name: counts[name] + more.get(name, 0) for name in order}
    return counts


def _drawn(chances: dict[str, Fraction], generator: torch.Generator) -> set[str]:
    """Names in random order, each drawn with its chance; as many as the chances add up to, a whole number."""
    if len(set(chances.values())) <= 1:
        return set(list(chances)[: int(sum(chances.values()))])
    # Systematic sampling: marks one apart from a random first one, laid over the chances side by side.
    end, drawn = Fraction(torch.rand((), generator=generator, dtype=torch.float64).item()), set()
    for name, chance in chances.items():
        start, end = end, end + chance
        if floor(end) > floor(start):
            drawn.add(name)
    return drawn


def needed(config: Config) -> dict[str, int]:
    """Teacher with a file -> how many responses it must have, to give its share and so that every group has its G."""
    group, has = config.rl.group_size, config.responses.per_question
    most = {name: ceil(share) for name, share in _shares(group, weights_of(config)).items()}
    sure = {each.name: has if each.responses is None else most[each.name] for each in config.teachers}
    files = [each.name for each in config.teachers if each.responses is not None]
    return {name: max(most[name], group - (sum(sure.values()) - sure[name])) for name in files}
