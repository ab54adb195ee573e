"""The answer reward of tasks whose answer is a number or a word: the last of its sort in the response decides."""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
WORD = re.compile(r"[A-Za-z]+")


def answer_reward(response: str, answer: str) -> float:
    """1.0 where the response's last number (or last word, for an answer in words) equals the answer, else 0.0."""
    if NUMBER.fullmatch(answer):
        found = NUMBER.findall(response)
        return float(bool(found) and float(found[-1]) == float(answer))
    found = WORD.findall(response)
    return float(bool(found) and found[-1].lower() == answer.lower())
