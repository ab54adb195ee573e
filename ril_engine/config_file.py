"""A YAML file and overrides -> a Config. Unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path

import yaml
from pydantic import ValidationError

from ril_engine.config import Config, Section
from ril_engine.errors import UserError


def _valid_keys(path: tuple) -> list[str]:
    """The fields of the section at a path of keys, list places and, where a list holds several kinds, a kind."""
    model, kinds = Config, {}
    for part in path:
        if isinstance(part, int):
            continue
        found = [model.model_fields[part].annotation] if part in model.model_fields else []
        for each in found:  # list[X], X | None and Annotated[A | B, ...] hold sections
            found.extend(typing.get_args(each))
        sections = [each for each in found if isinstance(each, type) and issubclass(each, Section)]
        model = kinds[part] if not found else sections[0]
        kinds = {each.model_fields["kind"].default: each for each in sections if "kind" in each.model_fields}
    return list(model.model_fields)


def _explain(error: dict) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        keys = _valid_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), keys, n=1, cutoff=0)
        return f"unknown key {where}: did you mean {near[0]!r}? (valid: {', '.join(keys)})"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] in ("value_error", "missing") else f", got {error['input']!r}"
    return f"{where}: {message}{got}"


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and `section.key=value` overrides into a validated Config.

    Raises:
        UserError: one line, for a missing file, malformed YAML, an unknown key or a bad value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"config {path}: {error.strerror}; give an existing YAML file, such as configs/digits.yaml"
        ) from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"config {path}: malformed YAML{line}: {getattr(error, 'problem', error)}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected a mapping of settings, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"config {path}: {'; '.join(_explain(e) for e in error.errors())}") from error


def _apply(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: expected section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {override}: {section} is not a section")
    tree[last] = yaml.safe_load(value)
