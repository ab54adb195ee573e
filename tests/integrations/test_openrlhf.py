"""OpenRLHF's own Actor.forward, with and without the fused log-probs. What it imports of flash-attn, which needs a GPU,
serves packed samples alone and stays unused here."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

pytest.importorskip("openrlhf", reason="OpenRLHF (requirements.peers.txt, Python 3.11) is not installed")
from transformers import Qwen2Config, Qwen2ForCausalLM

from ril_engine.engine import init_distributed
from ril_engine.integrations import openrlhf
from ril_engine.integrations.openrlhf import use_fused_logprob
from ril_kernels import token_logprob

UNUSED = {
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils.distributed": ("all_gather",),
}


@pytest.fixture
def actor_class(monkeypatch):
    for name in ("flash_attn", "flash_attn.utils", *UNUSED):
        module = ModuleType(name)
        vars(module).update(dict.fromkeys(UNUSED.get(name, ())))
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.startswith("openrlhf.models")]:
        monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module("openrlhf.models.actor")
    # Of the same function, without a compiler.
    monkeypatch.setattr(module, "compute_entropy", module.compute_entropy._torchdynamo_orig_callable)
    return module.Actor


def make(actor_class, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=37, num_key_value_heads=1, initializer_range=0.3, **sizes)
    for name, value in settings.items():
        setattr(config, name, value)
    actor = actor_class(Qwen2ForCausalLM(config))
    actor.temperature, actor.packing_samples = 0.7, False
    return actor


def total_of(actor) -> tuple[torch.Tensor, ...]:
    ids = torch.randint(37, (3, 9), generator=torch.Generator().manual_seed(0))
    attention, action = torch.ones_like(ids), torch.ones(3, 5)
    attention[1, :2] = 0
    action[2, 3:] = 0
    settings = {"action_mask": action, "attention_mask": attention, "return_output": True, "return_entropy": True}
    logprobs, output = actor(ids, **settings)
    total = (logprobs * torch.linspace(-1, 1, 5)).sum() - 0.1 * (output.entropy[:, -5:] * action).sum()
    return total, logprobs.detach(), output.entropy.detach(), ids, attention


def results(actor) -> list[torch.Tensor]:
    total, logprobs, entropy, ids, attention = total_of(actor)
    actor.zero_grad()
    total.backward()
    plain = actor(ids, attention_mask=attention, return_logprobs=True)
    gradients = [each.grad.clone() for each in actor.parameters()]
    return [logprobs, entropy, plain.detach(), *gradients]


def test_an_actor_gives_what_it_gave(actor_class):
    actor = make(actor_class)
    ids = torch.arange(12).view(2, 6)
    whole = actor(ids, attention_mask=torch.ones_like(ids), return_output=True).logits
    expected = results(actor)
    use_fused_logprob(actor)
    for ours, theirs in zip(results(actor), expected, strict=True):
        assert float(theirs.abs().max()) > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))
    assert torch.equal(actor(ids, attention_mask=torch.ones_like(ids), return_output=True).logits, whole)
    assert actor.model.lm_head.forward.__func__ is torch.nn.Linear.forward  # as it was between two calls


def test_no_logits_are_made_and_the_head_is_read_once(actor_class, monkeypatch):
    actor, calls = make(actor_class), []
    use_fused_logprob(actor)
    monkeypatch.setattr(
        openrlhf, "token_logprob", lambda *args, **more: calls.append(more) or token_logprob(*args, **more)
    )
    ids = torch.arange(12).view(2, 6)
    settings = {"attention_mask": torch.ones_like(ids), "return_output": True}
    assert actor(ids, torch.ones(2, 3), **settings)[1].logits.shape == (2, 6, 1)
    assert actor(ids, torch.ones(2, 3), **settings, return_entropy=True)[1].logits.shape == (2, 6, 2)
    assert [each["return_entropy"] for each in calls] == [False, True]


def test_packed_samples_bring_their_labels(actor_class, monkeypatch):
    """Their unpadding, which flash-attn does, by hand: both rows side by side, without padding."""
    actor = make(actor_class)
    ids = torch.randint(37, (2, 6), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(ids)
    expected = actor(ids, attention_mask=attention, return_logprobs=True)
    home, (batch, length) = sys.modules[actor_class.__module__], ids.shape
    one_row = [each.reshape(1, -1) for each in (ids, torch.arange(length).repeat(batch), ids.roll(-1, 1))]
    monkeypatch.setattr(home, "unpad_and_slice_tensor", lambda *_: (*one_row, 0, None))
    monkeypatch.setattr(home, "gather_and_pad_tensor", lambda values, *_: values.view(batch, length))
    actor.packing_samples = True
    theirs = actor(ids, attention_mask=attention, return_logprobs=True)
    use_fused_logprob(actor)
    ours = actor(ids, attention_mask=attention, return_logprobs=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[:1], expected[:1], rtol=0, atol=1e-5)  # it reads itself alone


@pytest.mark.distributed
def test_under_zero_3_the_gradients_are_the_same(actor_class):
    """The engine wraps the actor's model, as OpenRLHF's strategy does it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    init_distributed()
    settings = {"train_batch_size": 3, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    settings |= {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    actor = make(actor_class)
    results(actor)
    expected = {name: each.grad.clone() for name, each in actor.model.named_parameters()}
    actor = make(actor_class)
    use_fused_logprob(actor)
    optimizer = torch.optim.AdamW(actor.model.parameters())
    actor.model, *_ = deepspeed.initialize(model=actor.model, optimizer=optimizer, config=settings)
    actor.model.backward(total_of(actor)[0])
    for name, each in actor.model.module.named_parameters():
        torch.testing.assert_close(safe_get_full_grad(each), expected[name], rtol=1e-4, atol=1e-5)


def test_what_is_no_plain_head_is_refused(actor_class):
    with pytest.raises(ValueError, match="its head has final_logit_softcapping, expected a plain matrix product"):
        use_fused_logprob(make(actor_class, final_logit_softcapping=3.0))
    with pytest.raises(TypeError, match=r"got Linear of torch\.nn\.modules\.linear, expected OpenRLHF 0\.11's Actor"):
        use_fused_logprob(torch.nn.Linear(2, 2))
