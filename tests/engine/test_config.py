"""Config files: one clear line for each kind of bad input."""

import pytest
import yaml

from ril_engine.config_file import load_config
from ril_engine.errors import UserError

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
        (GOOD + "rl: [", r"malformed YAML at line \d+, column \d+"),
        ("- 1", "expected a mapping of settings, got list"),
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
            "answer_rewards.0: Input tag 'jury' found using 'kind' does not match",
        ),
        (GOOD + "answer_rewards: [{kind: function, function: a}]", "answer_rewards.0.function.function: .*, got 'a'"),
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
        ("rl: {algorithm: grpo, group_size: 1}", "grpo needs at least 2 responses per question"),
    ],
)
def test_bad_config_is_one_line(write, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(write(text))
    assert "\n" not in str(caught.value) and "SECRET" not in str(caught.value)


def test_a_served_teacher_survives_the_config_that_a_run_writes(write):
    config = load_config(write("teachers: [{name: a, server: {url: 'http://h/v1/', model: m}}]"))
    assert (config.teachers[0].path, config.teachers[0].server.url) == ("", "http://h/v1")
    assert load_config(write(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_missing_file_and_bad_override(write, tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: No such file or directory; give an existing YAML file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"--set seed: expected section\.key=value"):
        load_config(write(GOOD), ["seed"])
