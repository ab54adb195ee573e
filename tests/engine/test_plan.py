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
from ril_engine.plan_engine import Trained, Weights
from ril_engine.plan_layouts import layouts
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


def case(size: str, stage: int, packing: str, length: int, **other) -> dict:
    """A step of each rank with one question, two thirds of whose `prompt` tokens are a picture's, and 8 responses."""
    prompt = other.pop("prompt", 96)
    tokens = {"text_tokens": prompt // 3, "image_tokens": prompt - prompt // 3, "length": length, "responses": 8}
    return {"size": size, "zero_stage": stage, "packing": packing, "ranks": 1, "bf16": False} | tokens | other


def planned(each: dict, path: str) -> dict[str, int]:
    config = settings(
        path,
        rl={"packing": each["packing"], "questions_per_step": each["ranks"]},
        deepspeed={"zero_stage": each["zero_stage"], "bf16": each["bf16"]},
        sampling={"max_new_tokens": each["length"]},
        plan={"text_tokens": each["text_tokens"], "image_tokens": each["image_tokens"]},
    )
    phases = Plan(config, each["ranks"], GPUS["h100"], device="cpu").phases()
    return {phase.name: phase.peak - phase.parts["cache"] for phase in phases if phase.name != "rollout"}


def off(folder: Path, cases: list[dict]) -> dict[str, float]:
    """By how much of the real peak each plan is off: of forward and backward, and of the update."""
    paths = {each["size"]: saved(folder / each["size"], SIZES[each["size"]]) for each in cases}
    asked = [each | {"model": paths[each["size"]]} for each in cases]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(JOB), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=5400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"policy"')]
    out = {}
    for each, real in zip(cases, found, strict=True):
        plan = planned(each, paths[each["size"]])
        stage, bucket = each["zero_stage"], 50_000_000 * (2 if each["bf16"] else 4)
        for name in plan if stage == 3 else ["policy"] if stage else []:  # it would hide an error of the rest
            plan[name], real[name] = plan[name] - bucket, real[name] - bucket
        if not stage:  # its all-reduce belongs to DeepSpeed's backward
            plan, real = {"peak": max(plan.values())}, {"peak": max(real.values())}
        key = " ".join(f"{name}={value}" for name, value in each.items())
        out |= {f"{key}: {name}": round(plan[name] / real[name] - 1, 4) for name in plan}
    print(*(f"{name} {error:+.2%}" for name, error in out.items()), sep="\n")
    return out


def assert_near(errors: dict[str, float]) -> None:
    """Stage 3 is left more room: the profiler goes on counting what gloo's threads free, so its own figures differed by
    7 % from run to run, by more of two ranks."""
    loose = {name: error for name, error in errors.items() if "zero_stage=3" in name}
    assert loose == pytest.approx(dict.fromkeys(loose, 0.0), abs=0.2)
    exact = {name: error for name, error in errors.items() if name not in loose}
    assert exact == pytest.approx(dict.fromkeys(exact, 0.0), abs=0.1)


def test_agrees_with_real_runs(tmp_path):
    """With responses of 2 tokens activations take less than what the update needs."""
    cases = [case("20M", 0, "packed", 64), case("20M", 0, "padded", 64), case("20M", 0, "shared", 2)]
    cases += [case("20M", 2, "shared", 64), case("20M", 2, "shared", 2), case("20M", 2, "shared", 16, bf16=True)]
    cases += [case("20M", 3, "shared", 64), case("20M", 0, "shared", 16, bf16=True)]
    assert_near(off(tmp_path, cases))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "prompt", "length"), [("60M", 96, 32), ("200M", 32, 16)])
def test_agrees_with_larger_real_runs(tmp_path, size, prompt, length):
    packings = ("shared", "packed", "padded")
    cases = [case(size, stage, packing, length, prompt=prompt) for stage in (0, 2) for packing in packings]
    cases += [case(size, 3, "shared", length, prompt=prompt)]
    assert_near(off(tmp_path, cases))


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
    monkeypatch.setattr(sys, "argv", [*command, "80", "--layouts"])
    assert main() == 2
    assert "--layouts with --gpus 2: expected 3 or more, one of which judges and one samples" in capsys.readouterr().err
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
        "deepspeed.zero_stage=3",
        "rl.packing=shared",
        "rl.micro_batch_tokens=2048",
        "sampling.cache_tokens=1000",
        "deepspeed.gradient_checkpointing=true",
        "deepspeed.offload_idle=true",
    ]
    assert last.deepspeed.bf16 and last.deepspeed.zero_stage == 3 and last.rl.micro_batch_tokens == 2048
    assert [len(each.split()) for each, _ in found] == [1, 2, 3, 4, 5, 6, 6, 7]
    assert found[-3][1].deepspeed.zero_stage == 2


def test_what_lives_above_the_limit_is_not_run(tmp_path, monkeypatch):
    config = settings(saved(tmp_path / "20M", SIZES["20M"]))
    ran = []
    monkeypatch.setattr(Plan, "_phase", lambda self, name, *_: ran.append(name))
    assert Plan(config, 1, GPUS["h100"]).phases(limit=4 * 16_000_000) == [] and not ran


def test_stage_3_divides_and_gathers(tmp_path):
    """By hand: of 512 x 512 weights and 512 biases a quarter each, and all biases, which are too few to let go of."""
    ledger = Ledger("cpu", RATES, 1e9)
    with ledger.fake:
        module = torch.nn.Linear(512, 512)
    config = settings("anywhere", deepspeed={"zero_stage": 3})
    with counted(ledger):
        weights = Weights(module, config, ledger, 4)
        assert weights.held == ledger.live == 4 * (512 * 512 // 4 + 512 // 4 + 512)
        assert weights.sent == 3 / 4 * 4 * (512 * 512 + 512)
        assert weights.to_read == 512 * 512 + 2 * 50_000_000 and weights.to_train == 500_000_000 + 2 * 50_000_000
        with weights.gathered() as size:
            assert size == 4 * (512 * 512 + 512) and ledger.live == weights.held + size
            out = module(torch.empty(1, 512)).sum()
            assert ledger.live == weights.held + size + 4 * (1 + 512)  # the sum, and the input for its backward
        del out
        trained = Trained(module, weights, config, ledger)
        share = 512 * 512 // 4 + 512 // 4
        held = 4 * (50_000_000 + share + share + 2 * share)  # bucket, gradients, parameters, moments
        assert trained.held == pytest.approx(held, abs=16)
        assert trained.sent(2) == 2 * weights.sent  # after each of two micro-batches; the next gather brings the rest


@pytest.mark.parametrize("stage", [2, 3])
def test_what_idles_or_is_computed_again_is_not_there(tmp_path, stage):
    tree = {
        "student": {"path": saved(tmp_path / "20M", SIZES["20M"])},
        "teachers": [{"name": "file", "responses": "anywhere.jsonl"}],
        "rl": {"questions_per_step": 2},
        "sampling": {"max_new_tokens": 256},
        "plan": {"text_tokens": 32, "image_tokens": 64},
    }

    def peaks(**other) -> dict:
        config = Config.model_validate(tree | {"deepspeed": {"zero_stage": stage, "bf16": True} | other})
        return {phase.name: phase for phase in Plan(config, 2, GPUS["h100"]).phases()}

    whole, idle, again = peaks(), peaks(offload_idle=True), peaks(gradient_checkpointing=True)
    there = {name: set(phase.parts) - {"cache", "gathered", "working"} for name, phase in idle.items()}
    assert all(parts == {"student", "optimiser", "reference", "discriminator"} for parts in there.values())
    assert idle["rollout"].parts["optimiser"] == 0 and idle["policy"].parts["optimiser"] > 0
    # Stage 3 keeps the tower and small parameters there.
    left = idle["policy"].parts["reference"] / whole["policy"].parts["reference"]
    assert (left == 0 if stage == 2 else 0 < left < 0.25) and idle["reference"].parts["reference"] > 0
    for name, phase in idle.items():
        assert phase.peak == sum(phase.parts.values()) < whole[name].peak
    assert again["policy"].peak < whole["policy"].peak and again["policy"].seconds > whole["policy"].seconds
    host = peaks(offload_optimizer=True)
    assert host["rollout"].parts["optimiser"] < whole["rollout"].parts["optimiser"]


def test_layouts_share_the_gpus_out(tmp_path):
    config = settings(saved(tmp_path / "20M", SIZES["20M"]), deepspeed={"zero_stage": 3, "bf16": True})
    together, judged, paper = layouts(config, 4, GPUS["h100"])
    for row in (together, judged, paper):
        assert row["step_s"] == pytest.approx(row["sampling_s"] + row["transfer_s"] + row["training_s"], abs=2e-3)
    assert together["transfer_s"] == 0 and "overlapped_s" not in judged
    assert paper["overlapped_s"] == pytest.approx(max(paper["training_s"], paper["sampling_s"]), abs=2e-3)
    assert paper["peak_gib"] > 0


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
        ledger.restart()
        x[torch.tensor([3, 5])] = x[torch.tensor([1, 2])]
        assert ledger.moved == 4 * 2 * 32 * 4  # two rows are read, made, read and written, of 32


def test_the_ledger_knows_what_the_host_knows():
    ledger = Ledger("meta", {torch.float32: 1e9}, 1e9)
    with counted(ledger):
        ids = torch.arange(6, device="meta")
        assert int((ids * 2)[ids > 3].sum()) == 18
        assert not hasattr(torch.zeros(3, device="meta") + ids[:3], "value")
