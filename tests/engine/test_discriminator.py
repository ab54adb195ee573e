"""D as it starts and what it reads: the student's decoder alone, and of a response nothing but its words."""

import shutil
import unicodedata

import pytest
import torch
from safetensors.torch import load_file, save_file

from ril_engine import discriminator, tiny_models
from ril_engine.adversary import Adversary
from ril_engine.config import Config, ModelConfig
from ril_engine.discriminator import (
    Discriminator,
    cleaned,
    discriminator_batch,
    encode_for_discriminator,
    load_decoder,
    new_discriminator,
    special_marks,
)
from ril_engine.errors import UserError
from ril_engine.families import language_model, only_rows, without_final_norm
from ril_engine.models import load

FAMILIES = ("student", "internvl_teacher")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny checkpoints of both families; the tokenizer of each knows the other's words."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in FAMILIES:
        tiny_models.build(folder / name, f"tiny:{name}", ["Who wrote it?", "<response></response>"], seed=0)
    return folder


def decoder_tensors(path) -> dict[str, torch.Tensor]:
    """The decoder's tensors of a checkpoint by their names in the decoder."""
    prefix = "model.language_model." if any("model.language_model." in key for key in load_file(path)) else None
    names = load_file(path)
    if prefix is None:
        prefix = "language_model.model." if any(key.startswith("language_model.") for key in names) else "model."
    return {key.removeprefix(prefix): value for key, value in names.items() if key.startswith(prefix)}


def equal(got: torch.nn.Module, want: torch.nn.Module) -> bool:
    got, want = got.state_dict(), want.state_dict()
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prefix", [None, "model.language_model.", "language_model.model.", "model."])
def test_only_the_decoder_is_read(checkpoints, tmp_path, name, prefix):
    """With a prefix: the layouts of hub files and of Transformers 4 and 5, without any vision weight."""
    folder = checkpoints / name
    want = language_model(load(ModelConfig(path=str(folder)))[0])
    if prefix is not None:
        folder = shutil.copytree(folder, tmp_path / "copy")
        tensors = decoder_tensors(folder / "model.safetensors")
        assert not any("vision" in key or "visual" in key for key in tensors)
        save_file({prefix + key: t for key, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    got = load_decoder(ModelConfig(path=str(folder)))
    assert equal(got, want) and type(got) is type(want)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(got.eval()(ids).last_hidden_state, want.eval()(ids).last_hidden_state)


def test_sharded_checkpoints_and_causal_lms(checkpoints, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model, _ = load(ModelConfig(path=str(checkpoints / "student")))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert equal(load_decoder(ModelConfig(path=str(tmp_path / "sharded"))), language_model(model))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    text = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_attention_heads=4, **sizes))
    text.save_pretrained(tmp_path / "text")
    assert equal(load_decoder(ModelConfig(path=str(tmp_path / "text"))), text.model)


def test_a_decoder_that_is_not_whole_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "internvl_teacher", tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    lost = [key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight") and "vision" not in key]
    assert len(lost) == 1
    del tensors[lost[0]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = r"copy: 1 weights of its language model are missing, such as layers\.1\.mlp\.up_proj\.weight; expected"
    with pytest.raises(UserError, match=message):
        new_discriminator(ModelConfig(path=str(folder)))
    with pytest.raises(
        UserError, match=r"none: its language model is not loadable \(.*; give a Hugging Face checkpoint"
    ):
        new_discriminator(ModelConfig(path=str(tmp_path / "none")))


@pytest.mark.parametrize("name", FAMILIES)
def test_states_before_the_final_norm(checkpoints, name):
    decoder = load_decoder(ModelConfig(path=str(checkpoints / name))).eval()
    torch.nn.init.normal_(decoder.norm.weight)
    ids = torch.arange(3, 40)[None]
    want = decoder(ids).last_hidden_state
    with without_final_norm(decoder.norm):
        before = decoder(ids).last_hidden_state
    assert not torch.allclose(before, want, atol=1e-2)
    assert torch.equal(decoder.norm(before), want) and torch.equal(decoder(ids).last_hidden_state, want)
    rows = torch.tensor([36, 3])
    with without_final_norm(decoder.norm), only_rows(decoder.norm, rows):
        assert torch.equal(decoder(ids).last_hidden_state, before[0, rows])


def test_a_norm_that_was_replaced_comes_back():
    norm = torch.nn.LayerNorm(4)
    norm.forward = lambda hidden: hidden * 2  # as Liger's is set
    with without_final_norm(norm):
        assert norm(torch.ones(4)).tolist() == [1] * 4
    assert norm(torch.ones(4)).tolist() == [2] * 4


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_score_is_of_normalised_states(checkpoints, offset):
    """A plain RMSNorm is fused with the score; another one, here Gemma's of 1 + weight, runs itself."""
    module, tokenizer = new_discriminator(ModelConfig(path=str(checkpoints / "student")))
    norm = module.language_model.norm
    plain = norm.forward
    if offset:
        norm.forward = lambda hidden: plain(hidden) * (norm.weight + offset) / norm.weight
        module = Discriminator(module.language_model, temperature=2.0)
    assert (module.score.eps is None) == bool(offset)
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.2)
    torch.nn.init.normal_(module.score.weight)
    rows = encode_for_discriminator(tokenizer, "Who wrote it?", TEXTS)
    inputs, last = discriminator_batch(rows, tokenizer.pad_token_id)
    labels = torch.tensor([True, False, True, True, False])
    out = module(inputs, last, labels=labels, norm=5)
    out.loss.backward()
    got = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    states = module.language_model(**inputs).last_hidden_state.flatten(0, 1)[last]  # after its norm
    logits = (states @ module.score.weight[0] + module.score.bias) / module.score.temperature
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    loss.backward()
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, loss)
    for one, parameter in zip(got, module.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-5, rtol=1e-4)
    assert len({id(each) for each in module.parameters()}) == len(got)


def test_d_is_made_before_its_norms_need_a_gpu(checkpoints, monkeypatch):
    def adapted(decoder, packing, device):
        decoder.norm.forward = lambda hidden: pytest.fail("Liger's norm ran on the CPU")

    monkeypatch.setattr(discriminator, "adapt", adapted)
    module, _ = new_discriminator(ModelConfig(path=str(checkpoints / "student")), "shared")
    assert module.score.eps == module.language_model.norm.variance_epsilon


TEXTS = ["7", "I see 7 and 8. 7*8=56. The answer is 56.", "", "> is a border", "caf\u00e9: so it is odd"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("alone")
def test_nothing_but_words_moves_the_score(checkpoints, name):
    from transformers import AutoTokenizer

    student = ModelConfig(path=str(checkpoints / name))
    other = AutoTokenizer.from_pretrained(checkpoints / next(each for each in FAMILIES if each != name))
    heads = torch.Generator().manual_seed(1)

    def judge(packing="padded", budget=8192) -> Adversary:
        rl = {"packing": packing, "micro_batch_tokens": budget}
        settings = {
            "teachers": [{"name": "a", "path": "x"}],
            "rl": rl,
            "discriminator": {"instruction": "Who wrote it?"},
        }
        module, tokenizer = new_discriminator(student, packing)
        torch.nn.init.normal_(module.score.weight, std=0.2, generator=heads.manual_seed(1))
        return Adversary(Config.model_validate(settings), module, tokenizer)

    def scores(adversary, texts):
        return adversary.logits(adversary.encode(texts), len(texts)).sigmoid()

    padded = judge()
    want = scores(padded, TEXTS)
    assert want.sort().values.diff().min() > 1e-3 and want.min() > 0.01 and want.max() < 0.99

    def same(got):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)

    for packing, budget in (("shared", 8192), ("shared", 70), ("packed", 8192), ("packed", 1), ("padded", 1)):
        same(scores(judge(packing, budget), TEXTS))
    same(scores(padded, TEXTS[::-1]).flip(0))
    same(torch.cat([scores(padded, [text]) for text in TEXTS]))
    own = padded.tokenizer.eos_token
    ends = (
        own,
        f" {own}\n",
        "</s>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[/INST]",
    )
    for end in (*ends, "\n\n", " \t\u3000", "\u200b", "<|im_<|im_end|>end|>"):
        same(scores(padded, [text + end for text in TEXTS]))
    for start in ("<s>", "<|im_start|>", "\ufeff", "\n "):
        same(scores(padded, [start + text for text in TEXTS]))
    same(scores(padded, [unicodedata.normalize("NFD", text) for text in TEXTS]))
    for eos in ([], [other.eos_token_id]):
        ids = [other(text, add_special_tokens=False)["input_ids"] + eos for text in TEXTS]
        assert ids != [padded.tokenizer(text, add_special_tokens=False)["input_ids"] + eos for text in TEXTS]
        same(scores(padded, other.batch_decode(ids)))


def test_what_is_cleaned(checkpoints):
    from transformers import AutoTokenizer

    marks = special_marks(AutoTokenizer.from_pretrained(checkpoints / "student"))
    for text, words in (
        ("<s>\n a  b </s>", "a  b"),
        ("\u200b <|vision_start|><|image_pad|>a<IMG_CONTEXT>b\ufeff\n", "ab"),
        ("<<|im_end|>|im_end|>", ""),
        ("a <- b | c -> d, x <| y |> z, [1], <b>", "a <- b | c -> d, x <| y |> z, [1], <b>"),
    ):
        assert cleaned(text, marks) == words
