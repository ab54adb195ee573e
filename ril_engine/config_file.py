"""A YAML file and overrides -> a Config. Unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path

import yaml
from pydantic import ValidationError

from ril_engine.config import AnswerRewardConfig, Config, Section
from ril_engine.errors import UserError

SHOWN_CHARACTERS = 80  # of a value in a message
REWARDS = typing.get_args(typing.get_args(AnswerRewardConfig)[0])
KINDS = ", ".join(each.model_fields["kind"].default for each in REWARDS)
EXPECTED = {  # in place of pydantic's words, which speak of its classes
    "model_type": "expected a mapping of its settings",
    "model_attributes_type": "expected a mapping of its settings",
    "list_type": "expected a list",
    "path_type": "expected a path",
    "invalid_key": "expected the name of a setting",
}


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would keep the last one."""

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} comes twice", key.start_mark)
            seen.add(key.value)
        return node


def _parse(text: str, where: str):
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: malformed YAML{line}: {problem}; mend it") from error


def _section(path: tuple) -> type[Section]:
    """The section at a path of keys, list places and, where a list holds several kinds, a kind."""
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
    return model


def _shown(value: object) -> str:
    """A setting may be long, and where a section is expected it may hold a key."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    shown = "nothing" if value is None else repr(value)
    return shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + "..."


def _explain(error: dict) -> str:
    kind, loc, value = error["type"], error["loc"], error["input"]
    where = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        keys = list(_section(loc[:-1]).model_fields)
        near = difflib.get_close_matches(str(loc[-1]), keys, n=1, cutoff=0.5)
        return f"unknown key {where}: {f'did you mean {near[0]!r}? ' if near else ''}(valid: {', '.join(keys)})"
    if kind == "missing":
        return f"{where} is missing: give it ({_section(loc[:-1]).model_fields[loc[-1]].description})"
    if kind.startswith("union_tag"):
        got = value.get("kind") if isinstance(value, dict) else value
        return f"{where}.kind: expected one of {KINDS}, got {_shown(got)}"
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    got = type(value).__name__ if kind.startswith("model_") and value is not None else _shown(value)
    return f"{where}: {EXPECTED.get(kind, error['msg'])}, got {got}"


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and `section.key=value` overrides into a validated Config.

    Raises:
        UserError: one line, for a missing file, malformed YAML, an unknown key or a bad value; of several the first.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"config {path}: {error.strerror}; give an existing YAML file, such as configs/digits.yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: no UTF-8 at byte {error.start}; save it as UTF-8 text") from error
    tree = _parse(text, f"config {path}")
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected a mapping of settings, got {_shown(tree)}; write key: value lines")
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first, *others = error.errors()
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(f"config {path}: {_explain(first)}{more}") from error


def _apply(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: expected section.key=value, such as rl.steps=50")
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {override}: {section} is no section; set all of it, --set '{section}=...'")
    tree[last] = _parse(value, f"--set {override}")
