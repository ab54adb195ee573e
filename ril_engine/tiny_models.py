"""Tiny checkpoints of real Hugging Face classes for the digits task, saved like any other checkpoint.

"tiny:student" and "tiny:qwen_teacher" are Qwen2.5-VL with one tokenizer, "tiny:internvl_teacher" is InternVL with
another, "tiny:judge" is Qwen2, which reads text only. They hold random weights; training teaches them. Nothing is
downloaded.
"""

from __future__ import annotations

from pathlib import Path

from ril_engine import digits
from ril_engine.errors import UserError

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE_PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
INTERNVL_IMAGE = "<IMG_CONTEXT>"

# name -> (family, hidden size, layers, style of its reasoned answers)
RECIPES = {
    "student": ("qwen2_5_vl", 96, 3, None),
    "qwen_teacher": ("qwen2_5_vl", 128, 4, "sentences"),
    "internvl_teacher": ("internvl", 128, 4, "clauses"),
    "judge": ("qwen2", 96, 3, None),
}
HEAD_SIZE = 32
INITIALIZER_RANGE = 0.08  # of the order of 1/sqrt(hidden); the usual 0.02 is for hidden sizes in the thousands


def recipe(path: str) -> tuple:
    name = path.removeprefix("tiny:")
    if name not in RECIPES:
        raise UserError(
            f"model {path!r}: no such tiny model; expected one of {', '.join('tiny:' + n for n in RECIPES)}"
        )
    return RECIPES[name]


def build(folder: Path, path: str, extra_text: list[str], seed: int) -> None:
    """Make and save model, tokenizer and processor of a "tiny:" path.

    Args:
        folder: where `from_pretrained` will find them.
        path: "tiny:NAME".
        extra_text: sentences besides the task's own that its tokenizer should know, such as D's instruction.
        seed: of the random weights.
    """
    import torch

    family, hidden, layers, _ = recipe(path)
    make = {"qwen2_5_vl": _qwen2_5_vl, "internvl": _internvl, "qwen2": _qwen2}[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = make(hidden, layers, digits.corpus() + extra_text * 20)
    tokenizer = getattr(processor, "tokenizer", processor)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _bpe(corpus: list[str], vocab_size: int, digit_pattern: str):
    """A byte-level BPE; `digit_pattern` decides how numbers are cut, so that two tokenizers cut them differently."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digit_pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet))
    return tokenizer


def _text_config(hidden: int, layers: int, vocabulary: int, tokenizer) -> dict:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_SIZE,
        "num_key_value_heads": hidden // HEAD_SIZE,
        "max_position_embeddings": 512,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen_tokenizer(corpus: list[str], vocab_size: int, specials: list[str]):
    import json

    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    trained = json.loads(_bpe(corpus, vocab_size, PRETOKENIZE_REGEX).to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        extra_special_tokens=specials,
    )


def _qwen2(hidden: int, layers: int, corpus: list[str]):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = _qwen_tokenizer(corpus, 768, ["<|im_start|>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    settings = _text_config(hidden, layers, -(-len(tokenizer) // 16) * 16, tokenizer)
    # The published theta is for contexts of thousands of tokens: most frequencies would hardly turn within a prompt.
    rope = {"rope_type": "default", "rope_theta": 100.0}
    return Qwen2ForCausalLM(Qwen2Config(**settings, rope_parameters=rope, tie_word_embeddings=True)), tokenizer


def _qwen2_5_vl(hidden: int, layers: int, corpus: list[str]):
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    specials = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _qwen_tokenizer(corpus, 512, specials)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in specials}
    config = Qwen2_5_VLConfig(
        text_config={
            **_text_config(hidden, layers, -(-len(tokenizer) // 16) * 16, tokenizer),
            # The two digits differ by one column only: with the published theta (10,000) and sections that turns the
            # slowest frequencies by 0.003 rad or less, and the student takes left for right.
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 12]},
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 3,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1, 2],
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    limits = {"size": {"shortest_edge": 28 * 56, "longest_edge": 56 * 112}}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**limits),
        chat_template=CHAT_TEMPLATE.replace("IMAGE_PLACEHOLDER", QWEN_IMAGE),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _internvl(hidden: int, layers: int, corpus: list[str]):
    from tokenizers import decoders
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        PreTrainedTokenizerFast,
    )

    side = 56  # square, as InternVL wants it: 4 x 4 patches, 2 x 2 tokens after the pixel shuffle
    trained = _bpe(corpus, 384, r"\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    trained.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": INTERNVL_IMAGE,
            "video_token": "<video>",
            "start_turn_token": "<|im_start|>",
        },
    )
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            **_text_config(hidden, layers, -(-len(tokenizer) // 16) * 16, tokenizer),
        },
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "initializer_range": INITIALIZER_RANGE,
            "image_size": [side, side],
        },
        image_token_id=tokenizer.convert_tokens_to_ids(INTERNVL_IMAGE),
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    size = {"height": side, "width": side}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=1),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace("IMAGE_PLACEHOLDER", INTERNVL_IMAGE),
    )
    return InternVLForConditionalGeneration(config), processor
