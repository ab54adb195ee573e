"""The discriminator D: a language model with a score in place of its vocabulary head, and how texts become its input.

It sees text only, cleaned of what could tell the sides apart without reading: marks of any model's chat format, white
space around the text, the form of composed characters. N responses, H hidden.
"""

from __future__ import annotations

import re
import unicodedata

import torch
from torch import Tensor, nn

from ril_engine.config import ModelConfig
from ril_engine.errors import UserError
from ril_engine.families import adapt, language_model, only_rows, rms_epsilon, without_final_norm
from ril_engine.packing import pack, padded
from ril_kernels import DiscriminatorOutput, discriminator_head

CPU = torch.device("cpu")
# Where checkpoints keep the decoder of a VLM or of a causal LM: Transformers 5, Transformers 4, and hub files.
DECODER = {r"^(?:model\.|language_model\.)*(?=(?:embed_tokens|layers|norm)\.)": ""}
# What other models' tokenizers take for a special token, and D's own may take for text.
FOREIGN_MARKS = (
    r"<[|\uff5c][^<>|\uff5c\s]{1,64}[|\uff5c]>",
    r"</?s>",
    r"<(?:pad|bos|eos|unk|mask|start_of_turn|end_of_turn|image|video|IMG_CONTEXT)>",
    r"</?img>",
    r"\[/?INST\]",
    r"\[(?:CLS|SEP|PAD|UNK|MASK)\]",
)
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"  # zero-width, no white space to str.strip


class Score(nn.Module):
    """Final norm and H x 1 of the last tokens as one op. It holds the weights of both, for ZeRO-3 gathers parameters
    module by module. A norm that is no plain RMSNorm runs itself, before."""

    def __init__(self, norm: nn.Module, hidden_size: int, temperature: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))
        self.eps, self.temperature = rms_epsilon(norm), temperature
        if self.eps is not None:
            self.norm_weight = norm.weight

    def forward(self, states: Tensor, last: Tensor, **loss_settings) -> DiscriminatorOutput:
        norm = {} if self.eps is None else {"final_norm": "rms", "norm_weight": self.norm_weight, "eps": self.eps}
        settings = {"temperature": self.temperature, **norm, **loss_settings}
        return discriminator_head(states, last, self.weight, self.bias, **settings)


class Discriminator(nn.Module):
    """D: the student's language model with its vocabulary head replaced by one H x 1, read at the last token."""

    def __init__(self, decoder, temperature: float = 1.0):
        super().__init__()
        self.language_model = decoder
        self.score = Score(decoder.norm, decoder.config.hidden_size, temperature)

    def forward(self, inputs: dict[str, Tensor], last: Tensor, **loss_settings) -> DiscriminatorOutput:
        """Of each of the N `last` (N,) rows of the flat states; with labels and norm its loss, too."""
        norm, fused = self.language_model.norm, self.score.eps is not None
        with without_final_norm(norm) if fused else only_rows(norm, last):
            states = self.language_model(**inputs, use_cache=False).last_hidden_state
        if fused:
            return self.score(states.flatten(0, 1), last, **loss_settings)
        return self.score(states, torch.arange(len(last), device=states.device), **loss_settings)


def new_discriminator(
    student: ModelConfig,
    packing: str = "padded",
    temperature: float = 1.0,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
):
    """D as it starts: the student's language model, made to read packs, and a zero score; and the student's tokenizer.
    It is on the CPU, ready to be moved to `device`.

    Raises:
        UserError: no such checkpoint, or a decoder that is not whole or cannot read packs.
    """
    from transformers import AutoTokenizer

    decoder = load_decoder(student, dtype)
    module = Discriminator(decoder, temperature)  # looks at its norm here, on the CPU, where Liger's cannot run
    adapt(decoder, packing, device)
    tokenizer = AutoTokenizer.from_pretrained(student.path, trust_remote_code=student.trust_remote_code)
    return module, tokenizer


def load_decoder(student: ModelConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The language model of a VLM's or a causal LM's checkpoint. Of a VLM's other weights none is read.

    Raises:
        UserError: no such checkpoint, or weights of the language model are missing.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    options = {"trust_remote_code": student.trust_remote_code}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else it lists what is left out
    try:
        config = AutoConfig.from_pretrained(student.path, **options).get_text_config(decoder=True)
        options |= {"config": config, "key_mapping": DECODER, "dtype": dtype}
        decoder, found = AutoModel.from_pretrained(student.path, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {student.path}: its language model is not loadable ({reason}); give a Hugging Face checkpoint"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model {student.path}: {len(missing)} weights of its language model are missing, such as {missing[0]}; "
            "expected all of them in its files: copy or download the checkpoint again"
        )
    return language_model(decoder)


def special_marks(tokenizer) -> re.Pattern:
    """What no text for D may hold: special tokens, of its own tokenizer and the usual ones of others."""
    own = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    own |= set(tokenizer.all_special_tokens)
    return re.compile("|".join([*map(re.escape, sorted(own, key=len, reverse=True)), *FOREIGN_MARKS]))


def cleaned(text: str, marks: re.Pattern) -> str:
    """A response's words alone. What is left after a removal is cleaned again, until nothing changes."""
    before = None
    while text != before:
        before = text
        text = marks.sub("", unicodedata.normalize("NFC", text)).strip().strip(INVISIBLE)
    return text


def encode_for_discriminator(tokenizer, instruction: str, texts: list[str]) -> list[list[int]]:
    """D's prompt holds the response only, as text encoded by D's own tokenizer: nothing but words tells the sides."""
    marks = special_marks(tokenizer)
    rendered = []
    for text in texts:
        turns = [
            {"role": "system", "content": instruction},
            {"role": "user", "content": f"<response>{cleaned(text, marks)}</response>"},
        ]
        rendered.append(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def discriminator_batch(
    rows: list[list[int]], pad_id: int, packing: str = "padded", shared: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """What `Discriminator` takes: rows padded to the right, or a pack ("packed": each row with its first `shared`
    tokens; "shared": they come once)."""
    if packing == "padded":
        inputs = padded(rows, pad_id)
        lengths = inputs["attention_mask"].sum(-1)
        return inputs, torch.arange(len(rows)) * inputs["input_ids"].shape[1] + lengths - 1
    prefix = {"input_ids": torch.tensor([rows[0][:shared]])}
    own = [row[shared:] for row in rows]
    inputs, spans = pack([(prefix, own)] if packing == "shared" else [(prefix, [row]) for row in own])
    return inputs, torch.tensor([start + count - 1 for _, start, count in spans])
