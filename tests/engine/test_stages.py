"""What the stages refuse, and what their keys depend on."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from ril_engine import stages
from ril_engine.config import Config, TrainingConfig
from ril_engine.errors import UserError


def config(tmp_path, **changes) -> Config:
    teachers = [{"name": "a", "path": "tiny:qwen_teacher"}]
    return Config.model_validate({"work_dir": tmp_path / "runs", "teachers": teachers} | changes)


def test_d_needs_responses_of_both_sides_in_both_parts(tmp_path):
    files = {}
    for source in ("student", "a"):
        files[source] = tmp_path / f"{source}.jsonl"
        files[source].write_text(json.dumps({"id": "q1", "text": "7"}) + "\n")
    with pytest.raises(UserError, match=r"no question in its held-out part has .*; raise responses.questions or set"):
        stages.discriminator(config(tmp_path), "tiny:student", files, "key")


def test_d_of_a_folder_that_was_moved_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "stage", lambda config, name, key, build: key)

    def key(folder, student: str = "responses_student-1", **changes) -> str:
        files = {"student": folder / student / "responses.jsonl", "a": folder / "responses_a-2" / "responses.jsonl"}
        return stages.discriminator(config(folder, **changes), "tiny:student", files, "key")

    assert key(tmp_path) == key(tmp_path / "elsewhere") != key(tmp_path, "responses_student-3")
    heavier = [{"name": "a", "path": "tiny:qwen_teacher", "weight": 2}]
    assert key(tmp_path, teachers=heavier) != key(tmp_path) != key(tmp_path, seed=1)


@pytest.mark.usefixtures("alone")
def test_every_rank_needs_an_example(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    settings = TrainingConfig(batch_size=2)
    with pytest.raises(UserError, match="SFT student: batch_size is 2, fewer than the 3 ranks"):
        stages.train_supervised(config(tmp_path), settings, None, tmp_path, "", tmp_path, "SFT student", 0)


def test_keys_hold_settings_and_code(tmp_path, monkeypatch):
    first = stages.key_of("data", config(tmp_path).data.digits)
    assert first == stages.key_of("data", config(tmp_path).data.digits)
    changed = config(tmp_path, data={"digits": {"sft_perception_share": 0.5}}).data.digits
    assert first != stages.key_of("data", changed)
    monkeypatch.setattr(stages, "_code", lambda name: f"another version of {name}")
    assert first != stages.key_of("data", config(tmp_path).data.digits)


def test_a_stage_hangs_on_its_own_code_alone(monkeypatch):
    """A change of the verifier judges anew and trains nothing anew."""
    before = {name: stages._code(name) for name in stages.CODE}
    read = Path.read_bytes
    changed = {"verifier.py": {"scores"}, "server.py": {"served responses", "scores"}, "digits.py": None}
    changed["digits.py"] = {"data", "teacher", "sft", "judge"}
    changed |= {"policy.py": {"teacher", "sft", "judge", "discriminator"}, "schedule.py": {"responses"}}
    changed["cache.py"] = {"responses"}
    for file, names in changed.items():
        monkeypatch.setattr(Path, "read_bytes", lambda path, file=file: read(path) + b"#" * (path.name == file))
        stages._code.cache_clear()
        assert {name for name in stages.CODE if stages._code(name) != before[name]} == names, file
    monkeypatch.undo()
    stages._code.cache_clear()
