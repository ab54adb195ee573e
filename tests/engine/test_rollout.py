"""Generation in the trainer's weights: Hugging Face's own tokens, whatever shares the batch; how bad students end."""

import copy
import json

import pytest
import torch

from ril_engine import digits, tiny_models
from ril_engine.config import DigitsConfig, ModelConfig, SamplingConfig
from ril_engine.errors import UserError
from ril_engine.models import Encoder, load
from ril_engine.packing import NO_MASK
from ril_engine.policy import Policy
from ril_engine.rollout import PaddedRollout, Response, Rollout, engine, seed_of
from ril_engine.rollout.cache import Cache, Prefill
from ril_engine.rollout.graphs import Graphs
from ril_engine.rollout.response import stopped_text
from ril_engine.rollout.schedule import Schedule
from ril_kernels import PackLayout

WORDS = ["left", "right", "What is", "the sum of", "digit", "7", "larger", "picture", "and", "twice"]
LIMIT = 10
DRAWN = SamplingConfig(max_new_tokens=LIMIT, temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """200 questions, one to forty words long, two of three with a picture."""
    folder = tmp_path_factory.mktemp("digits")
    settings = DigitsConfig(train_questions=40, validation_questions=1, test_questions=1, sft_questions=1)
    digits.build(folder, settings)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    generator = torch.Generator().manual_seed(0)
    questions = []
    for i in range(200):
        words = torch.randint(len(WORDS), (int(torch.randint(1, 40, (1,), generator=generator)),), generator=generator)
        text = " ".join(WORDS[w] for w in words)
        image = {"image": rows[i % len(rows)]["image"]} if i % 3 else {}
        questions.append((i, {"id": f"q{i}", "question": text, "answer": "7", **image}))
    return folder, questions


@pytest.fixture(scope="module", params=["student", "internvl_teacher"])
def family(request, task, tmp_path_factory):
    """A model with random weights far enough apart that float rounding decides no argmax."""
    path = tmp_path_factory.mktemp("model")
    tiny_models.build(path, f"tiny:{request.param}", [], seed=0)
    model, processor = load(ModelConfig(path=str(path)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), Encoder(model, processor, task[0], 10_000)


def by_hugging_face(model, encoder, questions, size=50):
    out = []
    for start in range(0, len(questions), size):
        inputs = encoder.prompts([row for _, row in questions[start : start + size]])
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                max_new_tokens=LIMIT,
                do_sample=False,
                suppress_tokens=encoder.banned_ids,
                eos_token_id=encoder.eos_ids,
                pad_token_id=encoder.pad_id,
            )
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            ends = [i for i, token in enumerate(row) if token in encoder.eos_ids]
            out.append(row[: ends[0] + 1] if ends else row)
    return out


def greedy(rollout, questions):
    return [each.ids for (each,) in rollout.generate(questions, 1, seed=0, greedy=True)]


def test_greedy_tokens_are_hugging_faces(family, task):
    model, encoder = family
    questions, settings = task[1], SamplingConfig(max_new_tokens=LIMIT, batch_size=64)
    want = by_hugging_face(copy.deepcopy(model), encoder, questions)
    assert len({tuple(ids) for ids in want}) > 20  # it says many things
    model = copy.deepcopy(model)
    for buckets in ((), (1, 3, 16, 40), (64,)):
        assert greedy(Rollout(model, encoder, settings, buckets), questions) == want
    rollout = Rollout(model, encoder, settings)
    assert greedy(rollout, questions[:30]) == want[:30]  # other buffers, and the first ones again
    assert greedy(rollout, questions) == want
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    policy = Policy(model)
    rows, ids = [row for _, row in questions[:4]], [[5, 6, 7]] * 4
    policy(encoder.batch(rows, ids, "shared")).sum().backward()
    optimizer.step()
    moved = by_hugging_face(copy.deepcopy(model), encoder, questions[:60])
    assert moved != want[:60] and greedy(rollout, questions[:60]) == moved


def drawn(rollout, questions, samples=3, seed=5):
    return [[each.ids for each in some] for some in rollout.generate(questions, samples, seed=seed)]


def test_a_response_does_not_depend_on_what_shares_its_batch(family, task):
    model, encoder = family
    questions = task[1][:24]
    want = drawn(Rollout(model, encoder, DRAWN), questions)
    assert len({tuple(ids) for some in want for ids in some}) > 48
    assert drawn(Rollout(model, encoder, DRAWN, (4, 16, 72)), questions) == want
    few = Rollout(model, encoder, DRAWN.model_copy(update={"batch_size": 7}))  # two questions at a time
    assert drawn(few, questions[::-1]) == want[::-1]
    assert drawn(few, questions[3:4]) == want[3:4]
    assert drawn(PaddedRollout(model, encoder, DRAWN), questions) == want
    assert drawn(few, questions[:4], seed=6) != want[:4]
    assert [some[:2] for some in want] == drawn(Rollout(model, encoder, DRAWN), questions, samples=2)


def test_padding_and_a_checkpoints_own_settings_change_nothing(family, task):
    """Padding that is also an end, as in Qwen's checkpoints, and a checkpoint that asks for repetitions."""
    model, encoder = copy.deepcopy(family[0]), copy.copy(family[1])
    encoder.eos_ids = [*encoder.eos_ids, encoder.pad_id]
    encoder.banned_ids = [i for i in encoder.banned_ids if i != encoder.pad_id]
    settings = DRAWN.model_copy(update={"repetition_penalty": 3.0})
    want = drawn(Rollout(model, encoder, settings), task[1][:12])
    model.generation_config.repetition_penalty = 0.05
    assert drawn(PaddedRollout(model, encoder, settings), task[1][:12]) == want
    assert model.generation_config.repetition_penalty == 0.05


def test_new_buffers_take_no_old_graph(family, task):
    rollout, cleared = Rollout(*family, DRAWN), []
    rollout.graphs.clear = lambda: cleared.append(rollout.cache)
    drawn(rollout, task[1][:4], samples=2)
    assert cleared.pop(0) is None
    cleared.clear()
    rollout.graphs.keep = lambda tensors: None  # as where new buffers get the addresses of the old ones
    drawn(rollout, task[1][:4], samples=2)
    assert not cleared
    drawn(rollout, task[1][:2], samples=4)
    assert cleared == [None]


def test_a_question_that_does_not_fit_is_refused(family, task):
    for change in ({"batch_size": 2}, {"cache_tokens": 40}):
        rollout = Rollout(*family, DRAWN.model_copy(update=change))
        with pytest.raises(
            UserError, match=r"batch_size .* and cache_tokens .* do not hold one question's 3 responses"
        ):
            drawn(rollout, task[1][:2])


def test_logprobs_are_the_trainers(family, task):
    model, encoder = family
    rows = [row for _, row in task[1][:5]]
    answers = [each for some in Rollout(model, encoder, DRAWN).generate(task[1][:5], 2, seed=3) for each in some]
    with torch.no_grad():
        batch = encoder.batch([row for row in rows for _ in range(2)], [each.ids for each in answers], "shared")
        want = Policy(model)(batch)
    got = torch.tensor([value for each in answers for value in each.sampler_logprobs])
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    of_draw = torch.tensor([value for each in answers for value in each.sampling_logprobs])
    assert (of_draw <= 0).all() and (of_draw > got).double().mean() > 0.9  # a cut distribution is denser


def test_a_student_that_wants_only_placeholders_or_never_stops(family, task):
    model, encoder = family
    biased = torch.zeros(model.lm_head.out_features)
    biased[model.config.image_token_id] = 1e4
    biased[encoder.eos_ids] = -1e4
    hook = model.lm_head.register_forward_hook(lambda _, __, out: out + biased)
    try:
        for as_greedy in (True, False):
            for some in Rollout(model, encoder, DRAWN).generate(task[1][:3], 2, seed=0, greedy=as_greedy):
                for each in some:
                    assert model.config.image_token_id not in each.ids
                    assert each.truncated and len(each.ids) == LIMIT
        ids = some[0].ids
    finally:
        hook.remove()
    assert torch.isfinite(Policy(model)(encoder.batch([task[1][2][1]], [ids]))).all()


def test_weights_that_are_not_numbers_are_named(family, task):
    model = copy.deepcopy(family[0])
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    for make in (Rollout, PaddedRollout):
        with pytest.raises(UserError, match="logits at token 0 of a response are not finite, expected numbers"):
            make(model, family[1], DRAWN).generate(task[1][:2], 2, seed=0)


def test_stop_strings_end_a_response(family, task):
    model, encoder = family
    plain = SamplingConfig(max_new_tokens=LIMIT)
    texts = [each.text for (each,) in Rollout(model, encoder, plain).generate(task[1][:6], 1, seed=0, greedy=True)]
    stop = max(texts, key=len)[2:4]
    settings = plain.model_copy(update={"stop": [stop]})
    for make in (Rollout, PaddedRollout):
        cut = [each for (each,) in make(model, encoder, settings).generate(task[1][:6], 1, seed=0, greedy=True)]
        assert [each.text for each in cut] == [stopped_text(text, [stop])[0] for text in texts]
        assert any(len(each.ids) < LIMIT and not each.truncated for each in cut)


def test_stopped_text():
    assert stopped_text("yes. no", ["no", "."]) == ("yes", True)
    assert stopped_text(" yes", ["no"]) == ("yes", False)
    assert stopped_text("one\n\ntwo", ["\n\n"]) == ("one", True)


def test_the_limit_and_eos(family):
    encoder, settings = family[1], SamplingConfig(max_new_tokens=2)
    one = Response()
    assert not one.append([7, -1.0, -0.5], encoder, settings) and one.append([8, -1.0, -0.5], encoder, settings)
    assert one.truncated and one.ids == [7, 8] and one.sampler_logprobs == [-1.0, -1.0]
    two = Response()
    assert two.append([encoder.eos_ids[0], -1.0, -0.5], encoder, settings) and not two.truncated and two.text == ""


def test_what_ends_at_the_limit_is_not_cut(family):
    encoder = family[1]
    settings = SamplingConfig(max_new_tokens=2)
    ended = Response()
    assert not ended.append([7, -1.0, -0.5], encoder, settings)
    assert ended.append([encoder.eos_ids[0], -1.0, -0.5], encoder, settings) and not ended.truncated
    tokens = encoder.response("78", eos=False)[:2]
    stopped, settings = Response(), settings.model_copy(update={"stop": [encoder.decode(tokens)[-1:]]})
    ends = [stopped.append([token, -1.0, -0.5], encoder, settings) for token in tokens]
    assert ends[-1] and not stopped.truncated


def test_seeds_of_purposes_differ():
    seeds = {seed_of(*parts) for parts in ((0, 1), (1, 0), (0, 1, 0), (0, 2), (0, 3, 0), (0, 3, 1))}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds) and seed_of(0, 1) == seed_of(0, 1)


def test_waiting_questions_enter_when_all_samples_have_left():
    schedule = Schedule(4, slots=2, samples=2)
    assert schedule.admit(lambda i: 10, budget=15) == [(0, 0)]  # the second would be over the budget
    assert schedule.admit(lambda i: 100, budget=15) == [(1, 1)]  # but one always enters
    assert schedule.admit(lambda i: 1, budget=15) == []
    assert schedule.running == {0: 0, 1: 0, 2: 1, 3: 1}
    schedule.leave(2)
    assert schedule.admit(lambda i: 1, budget=15) == []
    schedule.leave(3)
    assert schedule.admit(lambda i: 1, budget=15) == [(1, 2)]
    for row in (0, 1, 2, 3):
        schedule.leave(row)
    assert schedule.admit(lambda i: 1, budget=15) == [(0, 3)] and not schedule.done
    for row in (0, 1):
        schedule.leave(row)
    assert schedule.done


def test_graphs_are_dropped_when_what_they_address_has_moved():
    graphs, weight = Graphs(), torch.zeros(4)
    graphs.keep([weight])
    graphs._graphs["key"], graphs._pool = "a graph", "its pool"
    graphs.keep([weight])
    assert len(graphs) == 1
    graphs.keep([weight.clone()])
    assert len(graphs) == 0 and graphs._pool is None


@pytest.fixture
def bodiless(family):
    """The model without its numbers, in bfloat16."""
    return copy.deepcopy(family[0]).to("meta", torch.bfloat16)


def fake_rollout(model, encoder, monkeypatch):
    """On the fake GPU: two samples in each of three slots, room for 16 prompt and 16 response tokens."""
    words = lambda _, vocabulary: torch.empty(-(-vocabulary // 32), dtype=torch.int32, device="cuda")  # noqa: E731
    monkeypatch.setattr(engine, "token_bits", words)
    rollout = Rollout(model.to_empty(device="cuda"), encoder, DRAWN, (4,))
    rollout.cache = Cache(rollout.decoder, 3, 2, 16, 16)
    rollout.tables = engine.Tables(3, 2, rollout.vocabulary, penalty=True, device=rollout.device)
    return rollout


@pytest.mark.parametrize("greedy", [True, False])
def test_a_decode_step_waits_for_nothing(fake_gpu, family, bodiless, monkeypatch, greedy):
    """What a CUDA graph captures: no value is read, nothing is copied from or to the host."""
    with fake_gpu(), torch.no_grad():
        out = fake_rollout(bodiless, family[1], monkeypatch).step(4, 16, 8, greedy)
    assert (out.shape, out.device.type) == ((4, 3), "cuda")


def test_a_language_models_prefill_waits_for_nothing(fake_gpu, family, bodiless, monkeypatch):
    """The vision tower is not in it: Hugging Face's own reads the pictures' sizes on the host."""
    layout = PackLayout.from_groups([(5, []), (3, [])])
    with fake_gpu(), torch.no_grad():
        rollout = fake_rollout(bodiless, family[1], monkeypatch)
        ids = torch.empty(8, dtype=torch.int64, device="cuda")
        states = rollout.decoder(
            inputs_embeds=rollout.decoder.embed_tokens(ids)[None],
            position_ids=ids.expand(*rollout.axes, 1, -1),
            attention_mask=NO_MASK,
            use_cache=False,
            kv_cache=Prefill(rollout.cache, layout, ids, ids),
        ).last_hidden_state
    assert (states.shape[:2], states.device.type) == ((1, 8), "cuda")


@pytest.mark.gpu
def test_graphs_equal_eager_steps(family, task, monkeypatch):
    """Also after the weights have changed, and after a question has come with a longer prompt."""
    model = copy.deepcopy(family[0]).cuda()
    graphs, eager = (Rollout(model, family[1], DRAWN, (4, 16, 72)) for _ in range(2))
    monkeypatch.setattr(eager.graphs, "run", lambda key, step, state: step())
    for round_, questions in enumerate((task[1][:24], task[1][:5], task[1][20:50])):
        assert drawn(graphs, questions) == drawn(eager, questions)
        captured = len(graphs.graphs)
        assert captured > 0 and drawn(graphs, questions) == drawn(eager, questions)
        assert len(graphs.graphs) == captured  # replayed, not captured again
        with torch.no_grad():
            model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.05 * (round_ + 1))
    model.lm_head.weight.data = model.lm_head.weight.data.clone()  # its storage moves
    assert drawn(graphs, task[1][:5]) == drawn(eager, task[1][:5])
