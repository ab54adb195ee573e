"""OpenRLHF's own Actor.forward, with and without the fused log-probs. What it imports of flash-attn, which needs a GPU,
serves packed samples alone and stays unused here."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

pytest.importorskip("openrlhf", reason="OpenRLHF (requirements.peers.txt, Python 3.11) is not installed")
from transformers import Qwen2Config, Qwen2ForCausalLM

from ril_engine.integrations.openrlhf import use_fused_logprob

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


def results(actor) -> list[torch.Tensor]:
    ids = torch.randint(37, (3, 9), generator=torch.Generator().manual_seed(0))
    attention, action = torch.ones_like(ids), torch.ones(3, 5)
    attention[1, :2] = 0
    action[2, 3:] = 0
    settings = {"action_mask": action, "attention_mask": attention, "return_output": True, "return_entropy": True}
    logprobs, output = actor(ids, **settings)
    total = (logprobs * torch.linspace(-1, 1, 5)).sum() - 0.1 * (output.entropy[:, -5:] * action).sum()
    actor.zero_grad()
    total.backward()
    plain = actor(ids, attention_mask=attention, return_logprobs=True)
    gradients = [each.grad.clone() for each in actor.parameters()]
    return [logprobs.detach(), output.entropy.detach(), plain.detach(), *gradients]


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


def test_no_logits_are_made(actor_class):
    actor = make(actor_class)
    use_fused_logprob(actor)
    ids = torch.arange(12).view(2, 6)
    output = actor(ids, torch.ones(2, 3), torch.ones_like(ids), return_output=True)[1]
    assert output.logits.shape == (2, 6, 16)


def test_what_is_no_plain_head_is_refused(actor_class):
    with pytest.raises(ValueError, match="its head has final_logit_softcapping, expected a plain matrix product"):
        use_fused_logprob(make(actor_class, final_logit_softcapping=3.0))
    with pytest.raises(TypeError, match=r"got Linear of torch\.nn\.modules\.linear, expected OpenRLHF 0\.11's Actor"):
        use_fused_logprob(torch.nn.Linear(2, 2))
