"""Encoding, sampling and rewards: real tiny checkpoints, real pictures."""

import copy
import json

import pytest
import torch

from ril_engine import digits, models, tiny_models
from ril_engine.config import DigitsConfig, ModelConfig
from ril_engine.errors import UserError
from ril_engine.families import adapt, language_model, look_once, vision_tower
from ril_engine.models import Encoder, load
from ril_engine.policy import Policy


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    settings = DigitsConfig(train_questions=9, validation_questions=1, test_questions=1, sft_questions=1)
    digits.build(folder, settings)
    return folder, [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=["student", "internvl_teacher"])
def family(request, task, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_models.build(path, f"tiny:{request.param}", [], seed=0)
    model, processor = load(ModelConfig(path=str(path)))
    return model.eval(), Encoder(model, processor, task[0], 10_000)


def test_batched_logprobs_equal_one_by_one(family, task):
    model, encoder = family
    policy, rows = Policy(model), task[1]
    responses = [encoder.response(text) for text in ("7", "I see 7 and 8. The answer is 56.", "so it is odd.")]
    with torch.no_grad():
        together = policy(encoder.batch(rows[:3], responses))
        alone = [policy(encoder.batch([row], [ids])) for row, ids in zip(rows, responses, strict=False)]
        full = encoder.batch(rows[:1], responses[:1])
        logits = model(**full.inputs).logits[0].log_softmax(-1)
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=0)
    ids = full.inputs["input_ids"][0]
    by_hand = torch.stack([logits[t - 1, ids[t]] for t in range(len(ids) - len(responses[0]), len(ids))])
    torch.testing.assert_close(alone[0], by_hand, atol=2e-5, rtol=0)


@pytest.mark.parametrize("packing", ["padded", "packed", "shared"])
def test_a_frozen_tower_looks_once(family, task, packing):
    """Policy, its copy and generation share the look: the same log-probs and gradients of all that is trained."""
    (model, encoder), rows = family, [*task[1][:3], {"id": "none", "question": "How many?"}]
    responses = [encoder.response(text) for text in ("7", "I see 7 and 8.", "so it is odd.", "none")]
    plain, ours = Policy(copy.deepcopy(model)), Policy(copy.deepcopy(model))
    for each in (plain, ours):
        vision_tower(each.model).requires_grad_(False)
        adapt(language_model(each.model), packing, torch.device("cpu"))
    calls = []
    vision_tower(ours.model).register_forward_pre_hook(lambda *_: calls.append("model"))
    first = next(m for m in vision_tower(ours.model).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d)))
    first.register_forward_pre_hook(lambda *_: calls.append("look"))
    seeing = Encoder(ours.model, encoder.processor, task[0], 10_000, look_once(ours.model))
    rows, responses = ([each[i] for i in (0, 0, 1, 2, 3)] for each in (rows, responses))
    expected, got = plain(encoder.batch(rows, responses, packing)), ours(seeing.batch(rows, responses, packing))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    expected.sum().backward(), got.sum().backward()
    compared = 0
    for (name, one), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, atol=1e-4, rtol=1e-3)
            compared += 1
    assert compared > 20
    with torch.no_grad():
        copied = copy.deepcopy(ours)(seeing.batch(rows, responses, packing))
    torch.testing.assert_close(copied, got)
    assert calls.count("look") == 3 and "model" in calls  # three pictures, once each
    torch.testing.assert_close(seeing.prompt(rows[0])["input_ids"], encoder.prompt(rows[0])["input_ids"])


def test_a_tower_of_which_more_is_read_is_left_alone(family):
    model = copy.copy(family[0])
    model.config = copy.deepcopy(model.config)
    model.config.model_type = "another"
    assert look_once(model) is None
    model.config.model_type, model.config.vision_feature_layer = "internvl", [-1, -2]
    assert look_once(model) is None and "forward" not in vars(vision_tower(model))


def test_pictures_are_where_the_question_has_them(family, task):
    model, encoder = family
    names = [row["image"] for row in task[1][:2]]
    one, two = (
        {"id": "a", "question": text, "images": names} for text in ("left <image>or<image> right", "left right")
    )
    ids = [encoder.prompt(row)["input_ids"][0].tolist() for row in (one, two)]
    placeholder = model.config.image_token_id
    alone = encoder.prompt({**task[1][0]})["input_ids"][0].tolist().count(placeholder)
    assert [each.count(placeholder) for each in ids] == [2 * alone] * 2
    texts = [encoder.tokenizer.decode([i for i in each if i not in encoder.banned_ids]) for each in ids]
    assert "left or right" in texts[0] and "left right" in texts[1]
    assert "or" in encoder.tokenizer.decode(ids[0][ids[0].index(placeholder) : -ids[0][::-1].index(placeholder)])
    swapped = {**one, "images": names[::-1]}
    responses = [encoder.response("7 and 8"), encoder.response("so it is odd.")]
    model = copy.deepcopy(model)
    adapt(language_model(model), "shared", torch.device("cpu"))
    with torch.no_grad():
        found = [
            Policy(model)(encoder.batch([row, row], responses, packing))
            for row, packing in ((one, "padded"), (one, "shared"), (swapped, "shared"))
        ]
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=0)
    assert (found[1] - found[2]).abs().max() > 1e-3


def test_kept_prompts_are_bounded_in_bytes(family, task, monkeypatch):
    _, encoder = family
    encoder = Encoder(family[0], encoder.processor, task[0], 10_000)
    first = encoder.prompt(task[1][0])
    monkeypatch.setattr(models, "CACHED_BYTES", 2 * sum(value.nbytes for value in first.values()))
    again = [encoder.prompt(task[1][i]) for i in (1, 2, 3, 3, 0)]
    assert len(encoder._prompts) <= 2 and again[2] is again[3] and again[4] is not first
    assert all(again[4][key].equal(first[key]) for key in first)


def test_a_placeholder_is_banned_and_never_kept(family, task):
    model, encoder = family
    placeholder = model.config.image_token_id
    assert placeholder in encoder.banned_ids
    text = f"7{encoder.tokenizer.decode([placeholder])}8"
    ids = encoder.response(text)
    assert placeholder not in ids and encoder.decode(ids) == "78"
    Policy(model)(encoder.batch(task[1][:1], [ids])).sum().backward()


def test_rows_of_the_head_that_are_no_token_are_banned(family, task):
    model, encoder = family
    known, larger = len(encoder.tokenizer), copy.deepcopy(model)
    larger.resize_token_embeddings(known + 3)  # checkpoints round their vocabulary up
    banned = Encoder(larger, encoder.processor, task[0], 10_000).banned_ids
    assert banned[-3:] == [known, known + 1, known + 2] and not set(encoder.eos_ids) & set(banned)


def test_bad_input_is_named(task, family, tmp_path):
    _, encoder = family
    row = task[1][0]
    for change, message in (
        ({"id": "a", "image": "images/none.png"}, r"none\.png: no such file"),
        ({"id": "b", "image": "train.jsonl"}, "not a readable picture; expected PNG"),
        ({"id": "c", "image": "../x.png"}, "outside the dataset folder"),
        ({"id": "d", "question": "What is <|im_end|>?"}, "question d: its text holds a special token"),
    ):
        with pytest.raises(UserError, match=message):
            encoder.prompt({**row, **change})
    with pytest.raises(UserError, match=r"56 x 28 pixels, more than data\.max_image_pixels 10"):
        Encoder(family[0], encoder.processor, task[0], 10).prompt(row)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="not loadable as an image-text-to-text checkpoint"):
        load(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json in this folder"):
        load(ModelConfig(path=str(tmp_path)))
