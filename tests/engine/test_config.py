"""Bad configs, data, checkpoints and run folders: each is one clear line, exit code 2, and leaves nothing behind."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from ril_engine.config_file import load_config
from ril_engine.errors import exit_code
from ril_engine.locks import held

GOOD = "teachers: [{name: a, path: 'tiny:qwen_teacher'}]\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_defaults_are_the_papers(write):
    config = load_config(write(GOOD), ["rl.beta=0.05", "seed=3"])
    assert (config.rl.beta, config.seed, config.rl.group_size, config.rl.clip_low) == (0.05, 3, 4, 0.2)
    sampling = config.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (
        1,
        0.95,
        50,
        1.05,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampling: {stop: ['']}", r"sampling\.stop\.0: String should have at least 1 character, got ''"),
        ("sampling: {temperature: 1.0e-5}", r"sampling\.temperature: .*greater than or equal to 0\.0001"),
        ("sampling: {repetition_penalty: 0.001}", r"sampling\.repetition_penalty: .*greater than or equal to 0\.01"),
        (
            "rl: {algorithm: sft, importance_cap: 2}\nteachers: [{name: a, path: tiny:qwen_teacher}]",
            r"rl\.importance_cap has no effect with rl\.algorithm sft",
        ),
        (
            GOOD + "rl: {lora: {target_modules: [q_proj, lm_head]}}",
            r"target_modules: got lm_head, expected linear layers",
        ),
        (GOOD + "rl: {lora: {target_modules: []}}", r"target_modules: List should have at least 1 item"),
        (GOOD + "rl: {lora: {rank: 0}}", r"rl\.lora\.rank: Input should be greater than or equal to 1, got 0"),
        (
            GOOD + "rl: {lora: {}, train_vision_tower: true}",
            "rl.train_vision_tower is true with rl.lora, whose adapters",
        ),
        (GOOD + "rl: {steps: 5, betta: 1}", r"unknown key rl.betta: did you mean 'beta'\?"),
        (GOOD + "sed: 1", r"unknown key sed: did you mean 'seed'\?"),
        (GOOD + "data: {digits: {sede: 1}}", r"unknown key data.digits.sede: did you mean 'seed'\?"),
        ("teachers: [{name: a, pth: b}]", r"unknown key teachers.0.pth: did you mean 'path'\?"),
        (GOOD + "rl: {steps: -5}", r"rl.steps: Input should be greater than or equal to 1, got -5"),
        ("rl: {algorithm: ril}", "teachers is empty, but rl.algorithm is ril"),
        (GOOD + "rl: [", r"malformed YAML at line \d+, column \d+: .*; mend it"),
        (
            GOOD + "rl: {steps: 5",
            r"malformed YAML at line 2, column 14: expected ',' or '}', but got '<stream end>'; mend",
        ),
        (GOOD + "\tseed: 1", r"malformed YAML at line 2, column 1: found character '\\t' that cannot start any token"),
        (GOOD + "seed: !!python/object/apply:os.system [ls]", "malformed YAML at line 2.*could not determine a constr"),
        ("seed: 1\n---\nseed: 2", "malformed YAML at line 2, column 1: but found another document"),
        (GOOD + "seed: 2026-13-45", "malformed YAML: month must be in 1..12; mend it"),
        ("\0", "malformed YAML: unacceptable character #x0000: special characters are not allowed; mend it"),
        (
            GOOD + "rl: {beta: 0}\nrl: {steps: 1}",
            "malformed YAML at line 3, column 1: the key 'rl' comes twice; mend it",
        ),
        ("- 1", "expected a mapping of settings, got a list; write key: value lines"),
        (GOOD + "1: 2", "1: expected the name of a setting, got 1"),
        (GOOD + "xyzzy: 1", r"unknown key xyzzy: \(valid: seed, work_dir, "),
        (GOOD + "rl: 5", "rl: expected a mapping of its settings, got int"),
        (GOOD + "rl:", "rl: expected a mapping of its settings, got nothing"),
        (GOOD + "student: a", "student: expected a mapping of its settings, got str"),
        ("teachers: {name: a}", "teachers: expected a list, got a mapping"),
        ("teachers: [a]", "teachers.0: expected a mapping of its settings, got str"),
        ("teachers: [{path: a}]", r"teachers.0.name is missing: give it \(as it appears in responses and metrics\)"),
        ("teachers: [{name: 'a b', path: c}]", r"teachers.0.name: String should match pattern .*, got 'a b'"),
        ("teachers: [{name: a, path: c, weight: 0}]", "teachers.0.weight: Input should be greater than 0, got 0"),
        ("teachers: [{name: a, responses: 5}]", "teachers.0.responses: expected a path, got 5"),
        (
            "teachers: [{name: a, path: 'tiny:nobody'}]",
            "teachers.0.path: got 'tiny:nobody', no tiny teacher, expected tiny:qwen_teacher, tiny:internvl_teacher or",
        ),
        (
            "teachers: [{name: a, path: 'tiny:student'}]",
            "teachers.0.path: got 'tiny:student', no tiny teacher, expected tiny:qwen_teacher, tiny:internvl_teacher ",
        ),
        (
            "teachers: [{name: a, server: {model: m}}]",
            r"teachers.0.server.url is missing: give it \(base address, such",
        ),
        (
            "teachers: [{name: a, server: {url: 'http://h/v1', model: ''}}]",
            "server.model: String should have at least 1",
        ),
        (
            "teachers: [{name: a, server: 'http://me:SECRET@h/v1'}]",
            "teachers.0.server: expected a mapping of its settings, got str",
        ),
        (GOOD + "student: {path: ''}", "student.path: String should have at least 1 character, got ''"),
        (
            GOOD + "student: {path: 'tiny:nobody'}",
            "student.path: got 'tiny:nobody', no such tiny model, expected tiny:student, .* or a checkpoint",
        ),
        (GOOD + "student: {path: 'tiny:judge'}", "student is tiny:judge, which reads no pictures: give tiny:stu"),
        (GOOD + "sft: {steps: 0}", "sft.steps is 0, but student.path tiny:student is built by that training: raise it"),
        (GOOD + "data: {dir: 5}", "data.dir: Input should be a valid string, got 5"),
        (GOOD + "work_dir: 5", "work_dir: expected a path, got 5"),
        (GOOD + "rl: {steps: many}", "rl.steps: Input should be a valid integer, .*, got 'many'"),
        (GOOD + "rl: {steps: 2.5}", "rl.steps: Input should be a valid integer, .*, got 2.5"),
        (GOOD + "rl: {steps: true}", "rl: steps is true, but no switch: give its value"),
        (GOOD + "rl: {algorithm: ppo}", "rl.algorithm: Input should be 'ril', 'dr_grpo', 'grpo' or 'sft', got 'ppo'"),
        (GOOD + "rl: {learning_rate: .inf}", "rl.learning_rate: Input should be a finite number, got inf"),
        (GOOD + "rl: {clip_low: 2}", "rl.clip_low: Input should be less than or equal to 1, got 2"),
        (GOOD + "sampling: {top_p: 0}", "sampling.top_p: Input should be greater than 0, got 0"),
        (GOOD + f"sampling: {{stop: {'ab' * 99}}}", r"sampling.stop: expected a list, got 'abab\w{75}\.\.\.$"),
        (GOOD + "evaluation: {split: train}", "evaluation.split: Input should be 'test' or 'validation', got 'train'"),
        (GOOD + "on_bad_data: ignore", "on_bad_data: Input should be 'stop' or 'skip', got 'ignore'"),
        (GOOD + "deepspeed: {zero_stage: 7}", "deepspeed.zero_stage: Input should be 0, 1.* got 7"),
        (GOOD + "deepspeed: {bf16: maybe}", "deepspeed.bf16: Input should be a valid boolean, .*, got 'maybe'"),
        (
            GOOD + "responses: {per_question: 500}",
            "sampling.batch_size is 128, fewer than responses.per_question 500, which are decoded together: raise it",
        ),
        (
            "rl: {algorithm: dr_grpo, group_size: 129}",
            "sampling.batch_size is 128, fewer than rl.group_size 129, which are decoded together: raise it or lower",
        ),
        (
            GOOD + "sampling: {max_new_tokens: 9000}",
            "sampling.cache_tokens is 131072, fewer than responses.per_question 16 times sampling.max_new_tokens 9000",
        ),
        (
            GOOD + "rl: {steps: 0, betta: 1, beta: -1}",
            r"rl.steps: .* greater than or equal to 1, got 0 \(and 2 more\)$",
        ),
        (GOOD + "answer_rewards: [verifier]", "answer_rewards.0: expected a mapping of its settings, got str"),
        (
            GOOD + "answer_rewards: [{path: a}]",
            "answer_rewards.0.kind: expected one of verifier, judge, function, got nothing",
        ),
        ("teachers: [{name: a, path: b}, {name: a, path: b}]", r"names must differ, got \['a', 'a'\]"),
        ("teachers: [{name: spread, path: b}]", "teachers: the name spread is taken, by another's metrics: choose"),
        (
            GOOD + "responses: {per_question: 2}",
            "responses.per_question is 2 .* raise responses.per_question",
        ),
        (
            GOOD + "sft: {steps: 200, warmup_steps: 30, final_steps: 170}",
            "sft: warmup_steps 30 and final_steps 170 leave none of 200 steps",
        ),
        (GOOD + "discriminator: {validation_share: 0}", "validation_share: Input should be greater than 0, got 0"),
        ("teachers: [{name: a}]", "teachers.0: teacher a has neither path nor server nor responses: give one of them"),
        (
            "teachers: [{name: a, path: 'tiny:qwen_teacher', server: {url: 'http://h/v1', model: m}}]",
            "teachers.0: teacher a has path and server: remove all but one of them",
        ),
        (
            "teachers: [{name: a, trust_remote_code: true, server: {url: 'http://h/v1', model: m}}]",
            "teacher a has trust_remote_code and server: remove all",
        ),
        (
            "teachers: [{name: a, server: {url: 'host:8000/v1', model: m}}]",
            "teachers.0.server.url: got 'host:8000/v1', expected a base such as http://host:8000/v1",
        ),
        (
            "teachers: [{name: a, server: {url: 'http://h/v1', model: m, api_key: SECRET}}]",
            "unknown key teachers.0.server.api_key: did you mean 'api_key_env'",
        ),
        (
            "teachers: [{name: a, server: {url: 'http://me:SECRET@h/v1', model: m}}]",
            "server.url: expected a base such as .* without user, query or fragment",
        ),
        (
            "teachers: [{name: a, server: {url: 'http://h/v1', model: m, api_key_env: sk-SECRET}}]",
            "server.api_key_env: expected the name of an environment variable, .*; export the key in one and name it",
        ),
        (
            "teachers: [{name: a, path: b, responses: c.jsonl}]",
            "teachers.0: teacher a has path and responses: remove all but one of them",
        ),
        (GOOD + "answer_rewards: []\ndiscriminator: {use: none}", "answer_rewards is empty and rl.algorithm ril with"),
        ("rl: {algorithm: dr_grpo}\nanswer_rewards: []", "answer_rewards is empty and rl.algorithm dr_grpo with"),
        (GOOD + "answer_rewards: [{kind: judge}]", "answer_rewards.0.judge: a judge has neither path nor server"),
        (
            GOOD + "answer_rewards: [{kind: judge, pth: a}]",
            "unknown key answer_rewards.0.judge.pth: did you mean 'path'",
        ),
        (
            GOOD + "answer_rewards: [{kind: jury}]",
            "answer_rewards.0.kind: expected one of verifier, judge, function, got 'jury'",
        ),
        (GOOD + "answer_rewards: [{kind: function, function: a}]", "answer_rewards.0.function.function: .*, got 'a'"),
        (
            GOOD + "rl: {evaluate_questions: 5}",
            r"rl\.evaluate_questions is 5, without effect where rl\.evaluate_every is 0: set rl.evaluate_every",
        ),
        (GOOD + "discriminator: {similarity_levels: 1}", "similarity_levels is 1, one reward for all: give 0, or 2"),
        (
            GOOD + "discriminator: {objective: bradley_terry, label_smoothing: 0.1}",
            "label_smoothing has no effect with objective bradley_terry, which has no labels",
        ),
        (
            GOOD + "discriminator: {use: fixed, max_accuracy: 0.8}",
            "max_accuracy has no effect with use fixed and rl.alg",
        ),
        (
            "rl: {algorithm: dr_grpo}\ndiscriminator: {max_accuracy: 0.8}",
            "max_accuracy has no effect with use updated and rl.algorithm dr_grpo, which update no D: remove it",
        ),
        *(
            (GOOD + f"answer_rewards: [{{kind: judge, {settings}}}]", f"answer_rewards.0.judge: {message}")
            for settings, message in (
                ("path: 'tiny:student'", "got tiny:student with mode yes_no, expected tiny:judge with mode yes_no"),
                ("path: 'tiny:judge', mode: explain", "got tiny:judge with mode explain, expected tiny:judge with"),
                ("path: a, on_failure: zero", "on_failure has no effect with a path: remove it"),
                ("path: a, max_new_tokens: 9", "max_new_tokens has no effect with mode yes_no: remove it"),
                (
                    "server: {url: 'http://h/v1', model: m}, micro_batch_tokens: 9",
                    "micro_batch_tokens has no effect with a server: remove it",
                ),
            )
        ),
        (
            GOOD + "discriminator: {pretrain: {patienc: 1}}",
            "unknown key discriminator.pretrain.patienc: did you mean 'patience'",
        ),
        *(
            (GOOD + f"deepspeed: {{{settings}}}", rf"deepspeed(\.extra)?: {message}")
            for settings, message in (
                (
                    "offload_optimizer: true",
                    "offload_optimizer is true with zero_stage 0, expected 1, 2 or 3: set zero",
                ),
                (
                    "zero_stage: 2, offload_parameters: true",
                    "offload_parameters is true with zero_stage 2, expected 3: ",
                ),
                ("offload_idle: true", "offload_idle is true with zero_stage 0, expected 1, 2 or 3: set zero_stage: 1"),
                (
                    "zero_stage: 1, bf16: true, offload_idle: true",
                    "offload_idle is true with bf16 and zero_stage 1, exp",
                ),
                (
                    "zero_stage: 3, offload_idle: true, offload_parameters: true",
                    "offload_idle and offload_parameters are",
                ),
                (
                    "zero_stage: 2, offload_idle: true, offload_optimizer: true",
                    "offload_idle and offload_optimizer are b",
                ),
                ("extra: {zero_optimisation: {}}", "unknown key zero_optimisation: did you mean 'zero_optimization'"),
                (
                    "extra: {zero_optimization: {stage: 3}}",
                    "zero_optimization.stage is 3, but this engine relies on its own: set d",
                ),
                ("extra: {bf16: {enabled: true}}", "bf16.enabled is True, .*: set deepspeed.bf16 instead"),
                (
                    "extra: {bf16: {check_grad_overflow: false}}",
                    "bf16.check_grad_overflow is False, but this engine relies on its own: remove it",
                ),
                (
                    "zero_stage: 1, extra: {zero_optimization: {cpu_offload: true}}",
                    "zero_optimization.cpu_offload is True, .*: set d",
                ),
                (
                    "bf16: true, extra: {data_types: {grad_accum_dtype: fp32}}",
                    "extra.data_types is set with bf16 and zero_stage 0, expected 1, 2 or 3: remove one of them",
                ),
                (
                    "extra: {optimizer: {type: Lamb}}",
                    "optimizer is {'type': 'Lamb'}, .*: set learning_rate and weight_d",
                ),
                (
                    "extra: {zero_optimization: true}",
                    "zero_optimization is True, expected a mapping of DeepSpeed's set",
                ),
                ("extra: 3", "Input should be a valid dictionary, got 3"),
            )
        ),
        ("rl: {algorithm: grpo, group_size: 1}", "grpo needs at least 2 responses per question"),
    ],
)
def test_bad_config_is_one_line(write, capsys, text, message):
    assert exit_code(lambda: load_config(write(text)).model_dump()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: config \S+config\.yaml: ", line) and re.search(message, line), line
    assert "SECRET" not in line


def test_a_served_teacher_survives_the_config_that_a_run_writes(write):
    config = load_config(write("teachers: [{name: a, server: {url: 'http://h/v1/', model: m}}]"))
    assert (config.teachers[0].path, config.teachers[0].server.url) == ("", "http://h/v1")
    assert load_config(write(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_missing_file_and_bad_override(write, tmp_path, capsys):
    def told(path: Path, *overrides: str) -> str:
        assert exit_code(lambda: load_config(path, overrides).model_dump()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert told(tmp_path / "none.yaml").endswith(
        "none.yaml: No such file or directory; give an existing YAML file, such as configs/digits.yaml"
    )
    assert "Is a directory; give an existing YAML file" in told(tmp_path)
    good = write(GOOD)
    assert told(good, "seed") == "error: --set seed: expected section.key=value, such as rl.steps=50"
    assert told(good, "rl.steps=[").startswith("error: --set rl.steps=[: malformed YAML at line 1, column 2: ")
    assert told(good, "teachers.0.path=a").endswith("teachers is no section; set all of it, --set 'teachers=...'")
    assert "unknown key rl.stepps: did you mean 'steps'?" in told(good, "rl.stepps=4")
    assert "rl.steps: Input should be a valid integer, got nothing" in told(good, "rl.steps=")
    good.write_bytes(b"seed: 1 # \xe9")
    assert told(good).endswith("config.yaml: no UTF-8 at byte 10; save it as UTF-8 text")


QUESTION = {"id": "a", "question": "What is it?", "answer": "7"}
CONFIG = """
work_dir: {folder}/runs
data: {{dir: {folder}/data}}
student: {{path: {folder}/whole}}
sft: {{steps: 0}}
rl: {{algorithm: dr_grpo}}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    from ril_engine import tiny_models

    folder = tmp_path_factory.mktemp("checkpoints") / "whole"
    tiny_models.build(folder, "tiny:student", ["a"], 0)
    return folder


@pytest.fixture
def job(tmp_path, whole) -> Path:
    """The config of a job with questions and a checkpoint of its own."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps(QUESTION) + "\n")
    shutil.copytree(whole, tmp_path / "whole")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    return config


def refused(job: Path, ril, *arguments: str) -> str:
    """The one line that `ril ARGUMENTS` ends with; nothing of a stage or run is left."""
    code, _, err = ril(*arguments)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert code == 2 and "Traceback" not in err
    assert not [path for path in job.parent.glob("runs/**/*") if path.is_file() and path.parent.name != "locks"]
    return line


SERVED = "answer_rewards=[{kind: judge, server: {url: 'http://h/v1', model: m, api_key_env: NO_SUCH_KEY}}]"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("work_dir=JOB/config.yaml", "work_dir .*: File exists; set it to a folder that can be made and written"),
        ("work_dir=JOB/config.yaml/runs", "work_dir .*: Not a directory; set it to a folder"),
        ("work_dir=/sys/runs", "work_dir /sys/runs: .*; set it to a folder that can be made and written"),
        ("data.dir=JOB/none", "data .*none/train.jsonl: No such file or directory; data.dir must hold this file"),
        ("data.dir=JOB/config.yaml", "data .*config.yaml/train.jsonl: Not a directory; data.dir must hold this file"),
        ("evaluation.split=validation", "data .*/validation.jsonl: No such file or directory; data.dir must hold this"),
        (
            "answer_rewards=[{kind: function, function: 'no_module:f'}]",
            "answer reward no_module:f: ModuleNotFoundError",
        ),
        (
            "answer_rewards=[{kind: function, function: 'json:f'}]",
            "answer reward json:f: no such name in json, expected",
        ),
        (SERVED, "server http://h/v1: the environment variable that api_key_env names is not set; export the API key"),
        (
            "teachers=[{name: b, responses: JOB/none.jsonl}]",
            "teacher b, file .*none.jsonl: No such file or directory; give a JSONL file of responses",
        ),
        (
            "teachers=[{name: b, responses: JOB/config.yaml}]",
            r"teacher b, file .*config.yaml: lines that are no object: 5 \(first: line 2, not JSON .*; mend the file",
        ),
    ],
)
def test_a_bad_setting_is_told_before_anything_is_made(job, ril, setting, message):
    line = refused(job, ril, "train", "--config", job, "--set", setting.replace("JOB", str(job.parent)))
    assert re.match(f"error: {message}", line), line


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (5, "data .*train.jsonl, line 1: image is 5, expected a path inside the folder; mend it"),
        ("no.png", "image .*no.png: no such file; its question names it"),
        ("../config.yaml", "image '../config.yaml': outside the dataset folder .*; give a path inside it"),
    ],
)
def test_a_bad_image_is_told_before_anything_is_made(job, ril, image, message):
    (job.parent / "data" / "train.jsonl").write_text(json.dumps(QUESTION | {"image": image}) + "\n")
    line = refused(job, ril, "train", "--config", job)
    assert re.match(f"error: {message}", line), line


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def without_a_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    some = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(some, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 32
    (folder / "config.json").write_text(json.dumps(config))


def without(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder; give a Hugging Face checkpoint"),
        (without("config.json"), "no config.json in this folder; give a Hugging Face checkpoint"),
        (without("model.safetensors"), r"not loadable .*no file named model.safetensors.*; give a folder or hub name"),
        (without("processor_config.json"), "not loadable .*image processor.*; give a folder or hub name"),
        (without("tokenizer.json", "tokenizer_config.json"), "no tokenizer in its files; give a whole checkpoint"),
        (lambda folder: (folder / "config.json").write_text("{"), "not loadable .*not a valid JSON file.*; give a"),
        (cut, r"not loadable as an image-text-to-text checkpoint \(.*header.*\); give a folder or hub name"),
        (without_a_layer, r"12 weights are not in its files \(first: model.language_model.layers.1.*\); give a whole"),
        (of_another_size, r"9 weights are not in its files \(first: .*mlp.down_proj.weight\); give a whole checkpoint"),
    ],
)
def test_a_checkpoint_that_is_none_is_told(job, ril, spoil, message):
    spoil(job.parent / "whole")
    line = refused(job, ril, "evaluate", "--config", job)
    assert re.match(f"error: model .*whole: {message}", line), line


def test_what_cannot_be_resumed_is_told(job, ril):
    run_dir = job.parent / "run"
    resume = ("train", "--resume", run_dir)
    assert re.search("--resume .*run: no config.yaml there; expected the folder of a run", refused(job, ril, *resume))
    assert "a resumed run keeps its settings; start" in refused(job, ril, *resume, "--set", "seed=1")
    run_dir.mkdir()
    kept = run_dir / "config.yaml"
    kept.write_text("rl: {")
    assert re.search("config .*run/config.yaml: malformed YAML at line 1", refused(job, ril, *resume))
    shutil.copy(job, kept)
    assert re.search(r"run: no checkpoint was saved \(rl.save_every\); start a new run", refused(job, ril, *resume))
    with held(run_dir / "lock", lambda holder: None):
        assert re.search(r"run: in use by pid \d+ on \S+; let it end, or stop it", refused(job, ril, *resume))
    (run_dir / "result.json").write_text("{}")
    assert re.search("run: this run has ended, see its result.json; start a new one", refused(job, ril, *resume))


@pytest.mark.parametrize(
    ("gpus", "memory", "gpu", "message"),
    [
        ("0", "80", "h100", "--gpus 0: expected a number above 0; give"),
        ("1", "nan", "h100", "--gpu-memory nan: expected a number above 0; give"),
        ("1", "80", "tpu", "--gpu tpu: not in the table, expected one of a100, h100, h200, b200; give the nearest"),
    ],
)
def test_a_plan_for_no_gpu_is_told(job, ril, gpus, memory, gpu, message):
    sizes = ("--gpus", gpus, "--gpu-memory", memory, "--gpu", gpu)
    assert message in refused(job, ril, "plan", "--config", job, *sizes)
