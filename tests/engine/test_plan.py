"""`ril plan` against real runs, and on models whose weights no test could load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlavaConfig

from ril_engine.cli import main
from ril_engine.config import Config, ModelConfig
from ril_engine.errors import UserError
from ril_engine.gpus import GPUS, gpu_named
from ril_engine.ledger import Ledger, counted
from ril_engine.plan import Plan, alternatives, plan
from ril_engine.plan_models import Questions, model_config
from ril_engine.plan_table import verdict

JOB = Path(__file__).with_name("plan_job.py")
RATES = {torch.float32: 1e12}
# Published config.json of each: what its sizes depend on.
QWEN_VISION = {
    "model_type": "qwen2_5_vl",
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def qwen(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> dict:
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": tied,
        },
        "vision_config": QWEN_VISION | {"out_hidden_size": hidden},
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "tie_word_embeddings": tied,
    }


MODELS = {
    "Qwen2.5-VL-3B": (qwen(2048, 11008, 36, 16, 2, 151936, True), 3.75e9),
    "Qwen2.5-VL-7B": (qwen(3584, 18944, 28, 28, 4, 152064, False), 8.29e9),
    "InternVL3-8B": (
        {
            "model_type": "internvl",
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 151674,
                "max_position_embeddings": 32768,
            },
            "vision_config": {
                "model_type": "internvl_vision",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": [448, 448],
                "patch_size": [14, 14],
            },
            "image_seq_length": 256,
            "image_token_id": 151667,
            "tie_word_embeddings": False,
        },
        7.94e9,
    ),
}


def small(hidden: int, layers: int, vocabulary: int) -> dict:
    config = qwen(hidden, 3 * hidden, layers, hidden // 32, hidden // 64, vocabulary, True)
    config["text_config"]["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 6, 6],
    }
    config["vision_config"] |= {"depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4}
    config["vision_config"]["fullatt_block_indexes"] = [1]
    return config | {"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102}


KEYS = {0: ("peak",), 2: ("policy", "optimiser step")}
SIZES = {"20M": small(384, 8, 16384), "60M": small(640, 10, 16384), "200M": small(1024, 15, 32768)}


def saved(folder: Path, config: dict) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def settings(path: str, **sections) -> Config:
    """Text and picture of 32 and 64 tokens, one question with 8 responses of 64, no reference and no D."""
    base = {
        "student": {"path": path},
        "rl": {"algorithm": "dr_grpo", "beta": 0, "group_size": 8, "questions_per_step": 1},
        "sampling": {"max_new_tokens": 64},
        "plan": {"text_tokens": 32, "image_tokens": 64},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return Config.model_validate(base)


def measured(case: dict) -> dict[str, int]:
    """In a process of its own: DeepSpeed keeps an engine's memory until the process ends."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(JOB), json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def off(tmp_path: Path, size: str, stage: int, packing: str, length: int) -> dict[str, float]:
    """By how much of the real peak a plan is off: of forward and backward, and of the update."""
    path = saved(tmp_path / size, SIZES[size])
    case = {"model": path, "zero_stage": stage, "packing": packing, "length": length, "responses": 8}
    real = measured(case | {"text_tokens": 32, "image_tokens": 64})
    sections = {"rl": {"packing": packing}, "deepspeed": {"zero_stage": stage}, "sampling": {"max_new_tokens": length}}
    phases = {each.name: each for each in Plan(settings(path, **sections), 1, GPUS["h100"], device="cpu").phases()}
    planned = {name: each.peak - each.parts["cache"] for name, each in phases.items()}
    both = {"policy": planned["policy"], "optimiser step": planned["optimiser step"]}
    bucket = 4 * 50_000_000 if stage else 0  # DeepSpeed's would hide an error of the rest
    both["policy"] -= bucket
    real["policy"] -= bucket
    if not stage:  # its all-reduce belongs to DeepSpeed's backward
        both = {"peak": max(both.values())}
        real = {"peak": max(real.values())}
    return {name: both[name] / real[name] - 1 for name in both}


@pytest.mark.parametrize(
    ("stage", "packing", "length"),
    [(0, "packed", 64), (0, "padded", 64), (2, "shared", 64), (0, "shared", 2), (2, "shared", 2)],
)
def test_agrees_with_real_runs(tmp_path, stage, packing, length):
    """With responses of 2 tokens activations take less than what the update needs."""
    assert off(tmp_path, "20M", stage, packing, length) == pytest.approx(dict.fromkeys(KEYS[stage], 0.0), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["60M", "200M"])
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("packing", ["shared", "packed", "padded"])
def test_agrees_with_larger_real_runs(tmp_path, size, stage, packing):
    assert off(tmp_path, size, stage, packing, 64) == pytest.approx(dict.fromkeys(KEYS[stage], 0.0), abs=0.1)


def tree_of(folder: Path, name: str, **deepspeed) -> dict:
    return {
        "student": {"path": saved(folder / "model", MODELS[name][0])},
        "teachers": [{"name": "qwen32b", "path": "Qwen/Qwen2.5-VL-32B-Instruct"}],
        "deepspeed": deepspeed,
    }


@pytest.mark.parametrize("name", MODELS)
def test_plans_models_that_no_test_could_load(tmp_path, name):
    tree, parameters = tree_of(tmp_path, name, zero_stage=2, bf16=True), MODELS[name][1]
    result = plan(Config.model_validate(tree), gpus=8, gpu_memory_gib=1000, gpu="h100")
    names = [phase["name"] for phase in result["phases"]]
    assert names == ["rollout", "discriminator", "reference", "policy", "optimiser step"]
    parts = result["phases"][-1]["parts"]
    assert parts["student"] == pytest.approx(2 * parameters, rel=0.01)
    assert parts["reference"] == pytest.approx(2 * parameters, rel=0.01)
    assert all(phase["seconds"] > 0 for phase in result["phases"])
    assert result["fits"] and verdict(result).startswith("fits: ")


def test_the_command_prints_a_verdict_and_json(tmp_path, monkeypatch, capsys):
    file = tmp_path / "config.yaml"
    tree = settings(saved(tmp_path / "20M", SIZES["20M"])).model_dump(mode="json", exclude_defaults=True)
    file.write_text(yaml.safe_dump(tree))
    command = ["ril", "plan", "--config", str(file), "--gpus", "2", "--gpu-memory"]
    monkeypatch.setattr("ril_engine.cli.leave", lambda code: code)  # the job of one that other tests share goes on
    monkeypatch.setattr(sys, "argv", [*command, "0.36"])
    assert main() == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert not result["fits"] and result["would_fit"].split()[0] == "deepspeed.bf16=true"
    assert "does not fit: " in err and "it would with --set deepspeed.bf16=true" in err
    for option, got in (("--gpus", "0"), ("--gpu-memory", "-1")):
        monkeypatch.setattr(sys, "argv", [*command, "80", option, got])
        assert main() == 2
        assert f"{option} {got}: expected a number above 0" in capsys.readouterr().err


def test_says_where_nothing_that_was_tried_fits(tmp_path):
    config = settings(saved(tmp_path / "20M", SIZES["20M"]), deepspeed={"zero_stage": 2, "bf16": True})
    result = plan(config, gpus=1, gpu_memory_gib=0.01, gpu="a100")
    assert result["would_fit"] is None
    assert "nor does it with any of the settings tried: take more or larger GPUs" in verdict(result)


def test_alternatives_build_on_one_another(tmp_path):
    config = settings("anywhere", rl={"packing": "padded", "micro_batch_tokens": 4096}, sampling={"cache_tokens": 4000})
    found = alternatives(config)
    text, last = found[-1]
    assert text.split() == [
        "deepspeed.bf16=true",
        "deepspeed.zero_stage=2",
        "rl.packing=shared",
        "rl.micro_batch_tokens=2048",
        "sampling.cache_tokens=1000",
    ]
    assert last.deepspeed.bf16 and last.deepspeed.zero_stage == 2 and last.rl.micro_batch_tokens == 2048
    assert [len(each.split()) for each, _ in found] == [1, 2, 3, 4, 5]


def test_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(UserError, match="--gpu v100: not in the table, expected one of a100, h100, h200, b200"):
        gpu_named("v100")
    with pytest.raises(UserError, match=r"model .*nowhere: no config.json to plan from .*give a folder that holds one"):
        model_config(ModelConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="model llava: its pictures are of a form that is not known here"):
        Questions(LlavaConfig(), None, 8, 64)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_ledger_counts_what_lives(device):
    """By hand: 4 KiB each of x, y = x @ x and y + 1, of which y is freed before the last."""
    ledger = Ledger(device, {torch.float32: 1e9}, 1e9)
    with ledger.fake:
        x = torch.empty(32, 32, device=device)
    with counted(ledger):
        ledger.hold([x])
        ledger.restart()
        y = x @ x
        assert (ledger.live, ledger.flops, ledger.moved) == (8192, 2 * 32**3, 3 * 4096)
        assert ledger.seconds == pytest.approx(2 * 32**3 / 1e9)  # its bytes take 12 microseconds
        z = y + 1
        del y
        w = z.view(-1)
        assert (ledger.live, ledger.peak) == (8192, 12288)
        del z, w
        assert ledger.live == 4096


def test_the_ledger_knows_what_the_host_knows():
    ledger = Ledger("meta", {torch.float32: 1e9}, 1e9)
    with counted(ledger):
        ids = torch.arange(6, device="meta")
        assert int((ids * 2)[ids > 3].sum()) == 18
        assert not hasattr(torch.zeros(3, device="meta") + ids[:3], "value")
