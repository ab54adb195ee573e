"""The stages of the answer rewards of the teachers' saved responses, which never change: judged once, by their key."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import closing
from pathlib import Path

import torch.distributed as dist

from ril_engine.config import AnswerRewardConfig, Config, FunctionConfig, JudgeConfig
from ril_engine.questions import read_jsonl, training_questions
from ril_engine.rewards import AnswerRewards, Score, user_function, verdict_settings
from ril_engine.runlog import progress, warn
from ril_engine.stages import is_main, key_of, stage, together

SCORED_AT_ONCE = 256  # responses; what a judge said of earlier ones is kept if it fails


def scored_responses(config: Config, files: dict[str, Path], data_dir: Path) -> dict[str, dict[str, list[dict]]]:
    """Teacher -> question id -> its saved responses, each with answer_reward."""
    rows = {row["id"]: row for row in training_questions(config, data_dir)}
    saved: dict[str, dict[str, list[dict]]] = {}
    for name in (each.name for each in config.teachers):
        responses, by_id = read_jsonl(files[name], ("id",)), saved.setdefault(name, {})
        scores = _scores(config, name, files[name], responses, rows)
        for response, score in zip(responses, scores, strict=True):
            by_id.setdefault(response["id"], []).append(response | {"answer_reward": score.reward})
    return saved


def _scores(config: Config, source: str, file: Path, responses: list[dict], rows: dict[str, dict]) -> list[Score]:
    """A score of each response, stored as scores.jsonl. Each rank scores its share."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    key = key_of("scores", file.parent.name, [_decisive(each) for each in config.answer_rewards])

    def share() -> list[Score]:
        mine, scores = responses[rank::world], []
        with (
            closing(AnswerRewards(config, config.work_dir / "judged" / f"rank-{rank}")) as rewards,
            progress(len(mine), f"answer rewards of {source}", enabled=is_main()) as advance,
        ):
            for start in range(0, len(mine), SCORED_AT_ONCE):
                some = mine[start : start + SCORED_AT_ONCE]
                texts, truncated = [each["text"] for each in some], [each["truncated"] for each in some]
                scores += rewards.score([rows[each["id"]] for each in some], texts, truncated)
                advance(len(some))
        return scores

    def build(out: Path) -> None:
        shares = together(share)
        scores = [shares[i % world][i // world] for i in range(len(responses))]
        if is_main():
            lines = [
                {"id": response["id"], "sample": response["sample"], **score._asdict()}
                for response, score in zip(responses, scores, strict=True)
            ]
            (out / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    folder = stage(config, f"scores_{source}", key, build)
    scores = [Score(*(line[n] for n in Score._fields)) for line in read_jsonl(folder / "scores.jsonl", ("id",))]
    if unscored := sum(score.unscored > 0 for score in scores):
        warn(
            f"teacher {source}: {unscored} of {len(scores)} responses could not be scored in full, which counts as 0; "
            f"remove {folder} to score them again"
        )
    return scores


def _decisive(reward: AnswerRewardConfig) -> dict:
    """What a score depends on: not where, how fast and how patiently a judge is asked, but a function's source."""
    if isinstance(reward, JudgeConfig):
        return verdict_settings(reward) | reward.model_dump(include={"weight", "on_failure"})
    settings = reward.model_dump()
    if isinstance(reward, FunctionConfig):
        user_function(reward)  # imports its module, or says why not
        file = getattr(sys.modules[reward.function.partition(":")[0]], "__file__", None)
        settings["source"] = file and hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return settings
