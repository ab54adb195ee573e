"""Packed forward and backward against the plain padded Hugging Face forward, one response per row."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
from PIL import Image

from ril_engine import families, tiny_models
from ril_engine.config import ModelConfig
from ril_engine.discriminator import Discriminator, discriminator_batch, encode_for_discriminator
from ril_engine.errors import UserError
from ril_engine.models import Encoder, load
from ril_engine.packing import micro_batches, shared_tokens
from ril_engine.policy import Policy
from ril_kernels import PackLayout, prefix_attention

# One-token responses, ragged ones, and as many per prompt as not to be even.
RESPONSES = [[[5], [6, 7, 8, 9, 10, 11, 12], [13, 14]], [[5, 6], [21]], [[7, 7, 7, 7], [9], [8, 5, 3], [20, 21]]]


def picture(width, height, shade):
    image = Image.new("RGB", (width, height), (shade, 255 - shade, 40))
    image.paste((255, 255, 255), (width // 4, height // 4, width // 2, height // 2))
    return image


class Questions(Encoder):
    """An encoder whose questions are number 0, with two pictures, 1, with one, and 2, with none."""

    def __init__(self, model, processor):
        super().__init__(model, processor, ".", 10_000)
        pictures = [[picture(112, 56, 30), picture(56, 28, 200)], [picture(56, 56, 120)], []]
        self.encoded = [
            dict(processor(text=[self.render(len(some))], images=some or None, return_tensors="pt"))
            for some in pictures
        ]

    def render(self, pictures: int) -> str:
        parts = [{"type": "image"}] * pictures + [{"type": "text", "text": "What is left and right?"}]
        turns = [{"role": "user", "content": parts}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def prompt(self, question: int) -> dict:
        return self.encoded[question]


class TextQuestions(Questions):
    """The same for a model that only reads text."""

    def __init__(self):
        self.rope_index, self.pad_id = None, 0
        prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [3]]
        self.encoded = [{"input_ids": torch.tensor([i]), "attention_mask": torch.ones(1, len(i))} for i in prompts]


def vlm(folder, name, seed=0):
    """A tiny checkpoint's class and processor, with grouped-query heads and random weights."""
    from transformers import AutoModelForImageTextToText, Qwen2VLConfig

    recipe = {"qwen2_5_vl": "tiny:student", "qwen2_vl": "tiny:student", "internvl": "tiny:internvl_teacher"}[name]
    tiny_models.build(folder, recipe, ["<response></response>"], seed)
    model, processor = load(ModelConfig(path=str(folder)))
    config = model.config
    config.text_config.num_key_value_heads = 1
    if name == "qwen2_vl":
        tree, vision = config.to_dict(), config.vision_config
        text = {**tree["text_config"], "model_type": "qwen2_vl_text"}
        ours = {"depth": 2, "embed_dim": 96, "num_heads": 3, "hidden_size": vision.out_hidden_size, "mlp_ratio": 2}
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        config = Qwen2VLConfig(text_config=text, vision_config=ours, **{each: tree[each] for each in names})
    torch.manual_seed(seed)
    generation = model.generation_config
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64)
    model.generation_config = generation
    return shaken(model), Questions(model, processor)


def text_model(model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    config = AutoConfig.for_model(model_type, num_attention_heads=4, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    return shaken(AutoModelForCausalLM.from_config(config)), TextQuestions()


def shaken(model):
    """Zero biases and unit norms moved, so that nothing cancels."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.double().eval()


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl", "qwen2_vl", "qwen2", "llama", "qwen3"])
def family(request, tmp_path_factory):
    if request.param in families.PACKED:
        return text_model(request.param)
    return vlm(tmp_path_factory.mktemp("model"), request.param)


def flat():
    """Question numbers and responses, one per row."""
    return [q for q, some in enumerate(RESPONSES) for _ in some], [ids for some in RESPONSES for ids in some]


def weights(count):
    """What the loss weighs each response's log-probs with."""
    return torch.linspace(-1, 2, count, dtype=torch.float64)


def padded_truth(model, encoder):
    """Log-probs per response, and gradients, by Hugging Face's own forward of right-padded rows with its logits."""
    questions, responses = flat()
    inputs = encoder.batch(questions, responses).inputs
    logprobs = model(**inputs, use_cache=False).logits.log_softmax(-1)
    out = []
    for row, (question, ids) in enumerate(zip(questions, responses, strict=True)):
        first = encoder.prompt(question)["input_ids"].shape[1] - 1
        out.append(logprobs[row, torch.arange(first, first + len(ids)), torch.tensor(ids)])
    return out, gradients(model, sum(w * each.sum() for w, each in zip(weights(len(out)), out, strict=True)))


def packed(model, encoder, packing, budget):
    """The same from packs, and how many there were."""
    families.attend_over_packs(families.language_model(model))
    questions, responses = flat()
    policy = Policy(model)
    lengths = [encoder.prompt(question)["input_ids"].shape[1] for question in questions]
    (parts,) = micro_batches(packing, questions, lengths, list(map(len, responses)), budget=budget)
    out, loss = {}, 0
    for part in parts:
        batch = encoder.batch([questions[i] for i in part], [responses[i] for i in part], packing)
        logprobs = policy(batch)
        assert batch.inputs["input_ids"].shape[1] == batch.inputs["pack_layout"].num_tokens <= budget
        out |= {i: logprobs[batch.response_index == place] for place, i in enumerate(part)}
        loss = loss + (weights(len(responses))[part][batch.response_index] * logprobs).sum()
    return [out[i] for i in range(len(responses))], gradients(model, loss), len(parts)


def in_double(model, monkeypatch):
    """Hugging Face computes norms and the vision tower's rotary embedding in float32, backward too: no gradient could
    then be equal to 1e-10."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def rotate(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2).double(), sin.unsqueeze(-2).double()
        half = modeling_qwen2_vl.rotate_half
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    for module in (modeling_qwen2_vl, modeling_qwen2_5_vl):
        monkeypatch.setattr(module, "apply_rotary_pos_emb_vision", rotate)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def worst(got, want):
    """The largest relative error of a gradient, and the parameters that have none on either side."""
    zero = {name for name in want if want[name] is None or not want[name].any()}
    assert {name for name in got if got[name] is None or not got[name].any()} == zero
    return max(error(got[name], want[name]) for name in want.keys() - zero), zero


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_logprobs_and_gradients_equal_the_padded_forward(family, dtype, bound, monkeypatch):
    model, encoder = copy.deepcopy(family[0]).to(dtype), family[1]
    if dtype == torch.float64:
        in_double(model, monkeypatch)
    want, want_gradients = padded_truth(model, encoder)
    longest = encoder.prompt(0)["input_ids"].shape[1]
    for packing, budget in (("shared", 10_000), ("shared", longest + 8), ("packed", 10_000), ("packed", longest + 8)):
        got, got_gradients, count = packed(copy.deepcopy(model), encoder, packing, budget)
        assert count == 1 if budget == 10_000 else count >= 3
        assert max(error(g, w) for g, w in zip(got, want, strict=True)) < bound
        largest, zero = worst(got_gradients, want_gradients)
        assert largest < bound
        assert not zero


def test_a_leaky_mask_fails(family, monkeypatch):
    """Responses that also read the ones before them in their group."""
    model, encoder = copy.deepcopy(family[0]), family[1]
    want, want_gradients = padded_truth(model, encoder)

    def leaky(query, key, value, *, layout, scale):
        lengths = layout.starts.diff()
        whole = [int(lengths[layout.prefix == g].sum()) for g in layout.prefix.unique()]
        return prefix_attention(query, key, value, layout=PackLayout.from_groups([(n, []) for n in whole]), scale=scale)

    monkeypatch.setattr(families, "prefix_attention", leaky)
    got, got_gradients, _ = packed(model, encoder, "shared", 10_000)
    assert error(got[0], want[0]) < 1e-6  # the first response of a group is the same
    assert max(error(g, w) for g, w in zip(got, want, strict=True)) > 1e-3
    assert worst(got_gradients, want_gradients)[0] > 1e-2


def test_only_rows_that_predict_a_response_meet_the_norm_and_pictures_are_read_once(family):
    model, encoder = copy.deepcopy(family[0]), family[1]
    seen = {}
    inner = families.language_model(model)
    inner.norm.register_forward_hook(lambda _, inputs, out: seen.update(norm=out.shape[0]))
    inner.layers[0].register_forward_hook(lambda _, inputs, out: seen.update(layer=out.shape[1]))
    tower = next((m for n, m in model.named_modules() if n in ("model.visual", "model.vision_tower")), None)
    if tower is not None:
        tower.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(pixels=len((args or [kwargs["pixel_values"]])[0])),
            with_kwargs=True,
        )
    packed(model, encoder, "shared", 10_000)
    questions, responses = flat()
    prompts = [encoder.prompt(question) for question in set(questions)]
    assert seen["norm"] == sum(map(len, responses))
    assert seen["layer"] == sum(p["input_ids"].shape[1] for p in prompts) + sum(len(ids) - 1 for ids in responses)
    if tower is not None:
        assert seen["pixels"] == sum(len(p["pixel_values"]) for p in prompts if "pixel_values" in p)


def test_gradient_checkpointing_changes_nothing(family):
    model, encoder = copy.deepcopy(family[0]), family[1]
    want, want_gradients, _ = packed(copy.deepcopy(model).train(), encoder, "shared", 10_000)
    model.train().activation_checkpointing_enable()
    calls = []
    families.language_model(model).layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    got, got_gradients, _ = packed(model, encoder, "shared", 10_000)
    assert len(calls) == 2  # once more in backward
    assert max(error(g, w) for g, w in zip(got, want, strict=True)) < 1e-12
    assert worst(got_gradients, want_gradients)[0] < 1e-6


def test_what_is_not_a_pack_is_read_as_before(family):
    model, encoder = copy.deepcopy(family[0]), family[1]
    want, want_gradients = padded_truth(copy.deepcopy(model), encoder)
    families.attend_over_packs(families.language_model(model))
    got, got_gradients = padded_truth(model, encoder)
    assert all(map(torch.equal, got, want)) and worst(got_gradients, want_gradients)[0] == 0
    towers = [m.config for n, m in model.named_modules() if "vis" in n and type(m).__name__.endswith("Attention")]
    assert all(config._attn_implementation == "sdpa" for config in towers)
    left = {"input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 5]]), "attention_mask": torch.ones(2, 4)}
    left["attention_mask"][0, :2] = 0
    drawn = [each.generate(**left, max_new_tokens=5, do_sample=False, pad_token_id=0) for each in (model, family[0])]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "qwen2 has sliding_attention layers"),
        ("qwen3_next", {"num_experts": 2}, "qwen3_next has linear_attention layers"),
        ("mistral", {"sliding_window": None}, "mistral has layers that packs were never tried with"),
        ("llama", {"attention_dropout": 0.1}, r"llama has attention_dropout 0\.1"),
    ],
)
def test_a_family_that_cannot_read_packs_is_refused_by_name(model_type, settings, message):
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    decoder = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes, **heads, **settings))
    with pytest.raises(UserError, match=rf"rl\.packing: {message}, expected .*; set rl\.packing: padded"):
        families.attend_over_packs(decoder)
    assert decoder.config._attn_implementation == "sdpa"


def test_a_language_model_of_another_build_is_named():
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    with pytest.raises(UserError, match=r"model gpt2: its language model \(GPT2Model\) has no final norm called norm"):
        families.language_model(model)


def test_liger_interpreted():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "interpreted_liger.py")]
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0 and "2 passed" in result.stdout, result.stdout[-3000:] + result.stderr[-1000:]


TEXTS = ["", "7", "> is a border", "I see 7 and 8. The answer is 56.", "7"]


@pytest.mark.parametrize("packing", ["shared", "packed"])
def test_the_discriminator_reads_its_instruction_once(tmp_path, packing):
    model, encoder = vlm(tmp_path, "qwen2_5_vl")
    d = Discriminator(families.language_model(model)).double()
    torch.nn.init.normal_(d.score.weight)
    rows = encode_for_discriminator(encoder.tokenizer, "Who wrote it?", TEXTS)
    shared = shared_tokens(rows)
    want = d(*discriminator_batch(rows, encoder.pad_id)).logits
    want_gradients = gradients(d, (want * weights(len(rows))).sum())
    families.attend_over_packs(d.language_model)
    inputs, last = discriminator_batch(rows, encoder.pad_id, packing, shared)
    times = 1 if packing == "shared" else len(rows)
    assert inputs["input_ids"].shape[1] == times * shared + sum(len(row) - shared for row in rows)
    got = d(inputs, last).logits
    assert error(got, want) < 1e-6
    largest, zero = worst(gradients(d, (got * weights(len(rows))).sum()), want_gradients)
    assert largest < 1e-6 and not zero


def test_what_is_shared_ends_where_tokens_differ(tmp_path):
    """The tokenizer joins the ">" of the opening tag with what follows: the tag is no prefix of all rows' tokens."""
    _, encoder = vlm(tmp_path, "qwen2_5_vl")
    rows = encode_for_discriminator(encoder.tokenizer, "Who?", TEXTS)
    shared = shared_tokens(rows)
    assert all(row[:shared] == rows[0][:shared] and len(row) > shared for row in rows)
    assert len({tuple(row[: shared + 1]) for row in rows}) > 1
    turns = [{"role": "system", "content": "Who?"}, {"role": "user", "content": "<response>"}]
    rendered = encoder.tokenizer.apply_chat_template(turns, tokenize=False)
    tag = encoder.tokenizer(rendered[: rendered.index("<response>") + len("<response>")])["input_ids"]
    assert any(row[: len(tag)] != tag for row in rows) and shared < len(tag)
    assert shared_tokens([[1, 2, 3], [1, 2, 3]]) == 2
    assert shared_tokens([[1, 2, 3], [1, 2]]) == 1
