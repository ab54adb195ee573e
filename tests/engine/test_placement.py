"""On a GPU the updates wait for nothing: meta tensors stand for those there, from which no value can be read."""

import copy
from types import SimpleNamespace

import pytest
import torch

from ril_engine import adversary, loop
from ril_engine.families import language_model, use_liger
from ril_engine.placement import to_device
from ril_engine.plan_models import as_on_gpu
from ril_engine.policy import Policy
from ril_engine.runlog import PhaseTimer

GPU = torch.device("meta")


class Stepped(Exception):
    """The update is as far as the optimiser, after which results are read."""


class Updated:
    """In the place of an Engine, without DeepSpeed."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.backwards = module, 0

    def __call__(self, *arguments, **settings):
        return self.module(*arguments, **settings)

    def wake(self) -> None:
        """It does not rest."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()
        self.backwards += 1

    def step(self) -> None:
        raise Stepped


@pytest.fixture
def there(job, monkeypatch):
    """A loop whose models lie on the GPU, and responses to questions without pictures: of those Hugging Face's vision
    towers read the sizes on the host."""
    make, questions = job
    started = make(micro_batch_tokens=300, importance_cap=2.0)
    asked = [(i, {name: value for name, value in row.items() if name != "image"}) for i, row in questions]
    responses = started.rollout(0, asked)
    for place in (loop, adversary):
        monkeypatch.setattr(place, "device", lambda: GPU)
    policies = []
    for _ in range(2):
        model = copy.deepcopy(started.reference.model).to(GPU, torch.bfloat16).requires_grad_()
        policies.append(Policy(model))
    started.policy, started.reference = policies
    started.student = Updated(started.policy)
    judge = started.adversary
    judge.module = judge.module.to(GPU, torch.bfloat16)
    judge.module.language_model.norm.weight = judge.module.score.norm_weight  # one, as before they were moved
    judge.engine = Updated(judge.module)
    decoders = [language_model(policy.model) for policy in policies] + [judge.module.language_model]
    with as_on_gpu(decoders):
        for decoder in decoders:
            use_liger(decoder)
        yield SimpleNamespace(loop=started, responses=responses)


def test_what_a_gpu_would_be_waited_for_is_seen(no_waits):
    with no_waits("meta"):
        here = torch.arange(3)
        for wait in (lambda x: x.cpu(), lambda x: x.tolist(), lambda x: x[here], lambda x: x.copy_(here)):
            with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
                wait(torch.ones(3, device=GPU))


def test_copies_to_a_gpu_come_from_pinned_memory(fake_gpu):
    with fake_gpu():
        values = {"a": (torch.arange(3), "b"), "c": [torch.ones(2, device="cuda")]}
        moved = to_device(values, torch.device("cuda", 0))
    assert moved["a"][0].is_cuda and moved["a"][1] == "b" and moved["c"][0] is values["c"][0]


def test_an_update_of_the_policy_waits_for_nothing(there, no_waits):
    advantages = torch.linspace(-1, 1, len(there.responses))
    with no_waits("meta"), pytest.raises(Stepped):
        there.loop.update_policy(there.responses, advantages, PhaseTimer())
    assert there.loop.student.backwards > 1
    grads = {name: each.grad for name, each in there.loop.policy.named_parameters() if "visual" not in name}
    assert all(grad is not None and grad.device == GPU for grad in grads.values())


@pytest.mark.parametrize("objective", ["bce", "bradley_terry"])
def test_an_update_of_d_waits_for_nothing(there, no_waits, monkeypatch, objective):
    judge = there.loop.adversary
    judge.settings = judge.settings.model_copy(update={"objective": objective})
    labels = torch.tensor([each["source"] == "student" for each in there.responses])
    groups = torch.tensor([each["slot"] for each in there.responses])
    if objective == "bradley_terry":  # whose slopes are those of logits that are read before
        monkeypatch.setattr(judge, "logits", lambda batches, count: torch.zeros(count))
    with no_waits("meta"), pytest.raises(Stepped):
        batches = judge.encode([each["text"] for each in there.responses])
        judge.train(batches, labels, groups)
    assert judge.engine.backwards == len(batches) > 1
    assert all(each.grad is not None for each in judge.module.parameters())
