"""What is timed: the cases of each op; attention_cases.py and packing_cases.py have those of packs,
rollout_cases.py those of generation, step_cases.py whole steps.

T packed tokens, H hidden, V vocabulary, N responses. A candidate is added by one line in `candidates`, or in peers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import attention_cases, packing_cases, rollout_cases, step_cases
from benchmarks.case import BASELINE, BOTH, NO_GRAD, Case
from benchmarks.peers import discriminator_peers, logprob_peers, loss_peers, sampling_peers
from ril_kernels import discriminator_head, group_advantages, policy_loss, sample, token_bits, token_logprob
from ril_kernels.policy_loss.reference import group_advantages_reference
from ril_kernels.sampling.reference import sample_reference
from ril_kernels.token_logprob.reference import token_logprob_reference

OPS = (
    "token_logprob",
    "policy_loss",
    "group_advantages",
    "discriminator_head",
    "sampling",
    "prefix_attention",
    "policy_pack",
    "rollout",
    "step",
)
# H and V of the language model's head, as the checkpoints' config.json have them.
MODELS = {
    "Qwen2.5-VL-3B": (2048, 151_936),
    "Qwen2.5-VL-7B": (3584, 152_064),
    "InternVL3-1B": (896, 151_674),
    "InternVL3-2B": (1536, 151_674),
    "InternVL3-8B": (3584, 151_674),
    "Llama-3-8B": (4096, 128_256),
    "Qwen2.5-0.5B": (896, 151_936),
    "small": (128, 2048),
}
ALIKE = ("Qwen2.5-VL-7B", "InternVL3-2B", "InternVL3-8B")  # scaled they say what others do: in full runs alone
# device, full -> tokens and what H and V are divided by. A scaled head keeps the ratio of GEMM to epilogue within 4.
SIZES = {("cpu", False): (128, 4, 16), ("cpu", True): (1024, 1, 1), ("cuda", False): (8192, 1, 1)}
RESPONSE_LENGTH, GROUP_SIZE = 32, 4
# What a step of generation draws with: RIL's own, and a usual setting of inference.
SAMPLING = {"temperature 1": {}, "filtered": {"top_k": 50, "top_p": 0.95, "repetition_penalty": 1.05}}
FLOOR_ROWS = (128, 256, 342)  # and all of T


def _head_inputs(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
    states = torch.randn(tokens, hidden, generator=generator)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    return {
        "hidden": states.to(device, dtype),
        "lm_head": head.to(device, dtype),
        "target": target.to(device),
    }


def _gemms(inputs: dict, training: bool) -> list[Callable[[], object]]:
    """The bare products in buffers that exist already, by chunks of some rows: logits, and for training d(hidden) and
    d(lm_head), which every chunk but the first adds to."""
    hidden, head = inputs["hidden"], inputs["lm_head"]
    tokens, vocab = len(hidden), len(head)
    logits_of_all = hidden.new_empty(tokens, vocab)
    grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head) if training else None

    def run(rows: int) -> None:
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            states = hidden[part]
            logits = logits_of_all[: len(states)]
            torch.mm(states, head.T, out=logits)
            if training:
                torch.mm(logits, head, out=grad_hidden[part])
                if start == 0:
                    torch.mm(logits.T, states, out=grad_head)
                else:
                    grad_head.addmm_(logits.T, states)

    return [partial(run, rows) for rows in (*(rows for rows in FLOOR_ROWS if rows < tokens), tokens)]


def _gemm_flops(inputs: dict) -> dict[str, int]:
    each = 2 * inputs["hidden"].numel() * len(inputs["lm_head"])
    return {NO_GRAD: each, BOTH: 3 * each}


def token_logprob_case(name: str, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    inputs = _head_inputs(tokens, hidden, vocabulary, dtype, device)
    candidates = {
        BASELINE: lambda **inputs: token_logprob_reference(**inputs)[0],
        "ril_kernels": token_logprob,
        **logprob_peers(device),
    }
    return Case(
        "token_logprob",
        f"token_logprob {name} T={tokens} H={hidden} V={vocabulary}",
        inputs,
        candidates,
        {NO_GRAD: _gemms(inputs, False), BOTH: _gemms(inputs, True)},
        "1 GEMM; 3 GEMMs with the gradient",
        _gemm_flops(inputs),
        grad=("hidden", "lm_head"),
    )


def policy_loss_case(
    name: str, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str, idle_half: bool = False
) -> Case:
    """With `idle_half`, half of the groups have equal rewards and no KL: their tokens need no GEMM."""
    inputs = _head_inputs(tokens, hidden, vocabulary, dtype, device)
    responses = tokens // RESPONSE_LENGTH
    with torch.no_grad():
        policy = token_logprob(**inputs)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, tokens, generator=generator).to(policy) * 0.2
    inputs |= {
        "response_index": torch.arange(responses).repeat_interleave(RESPONSE_LENGTH),
        "rewards": torch.randint(3, (responses,), generator=generator).float(),
        "groups": torch.arange(responses) // min(GROUP_SIZE, responses // 2),  # two of them at least
        "behavior_logprobs": policy + noise[0],
        "reference_logprobs": policy + noise[1],
        "beta": 0.01,
        "norm": float(tokens),
    }
    candidates = {
        BASELINE: lambda **inputs: policy_loss(**inputs, backend="reference")[0],
        "ril_kernels": lambda **inputs: policy_loss(**inputs)[0],
        **({} if idle_half else loss_peers(device)),
    }
    if idle_half:
        inputs["rewards"][: responses // 2], inputs["beta"] = 1.0, 0.0
        inputs["rewards"][responses // 2 :: 2] += 3.0
        name += ", half of the groups of one mind"
    return Case(
        "policy_loss",
        f"policy_loss {name} T={tokens} N={responses} H={hidden} V={vocabulary}",
        inputs,
        candidates,
        {BOTH: _gemms(inputs, True)},
        "3 GEMMs of all tokens" + (", of which half need none: 200 % cannot be beaten" if idle_half else ""),
        _gemm_flops(inputs),
        grad=("hidden", "lm_head"),
        no_grad=False,
    )


def group_advantages_case(responses: int, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(3, (responses,), generator=generator).float()
    inputs = {"rewards": rewards, "groups": torch.arange(responses) // 8}
    out, ids = torch.empty_like(rewards), torch.empty_like(inputs["groups"])
    candidates = {
        BASELINE: lambda rewards, groups: group_advantages_reference(rewards, groups, "dr_grpo"),
        "ril_kernels": group_advantages,
        "ril_kernels (unchecked C++)": lambda rewards, groups: torch.ops.ril_kernels.group_advantages(
            rewards, groups, "dr_grpo"
        ),
    }
    return Case(
        "group_advantages",
        f"group_advantages N={responses}",
        inputs,
        candidates,
        {NO_GRAD: [lambda: (out.copy_(rewards), ids.copy_(inputs["groups"]))]},
        "a copy of N float32 and N int64",
        num_bytes=2 * responses * (4 + 8),
    )


def discriminator_head_case(responses: int, hidden: int, dtype: torch.dtype, device: str) -> Case:
    """The final RMSNorm, the score and the loss of D at the last of 32 tokens per response."""
    generator = torch.Generator().manual_seed(0)
    tokens = RESPONSE_LENGTH * responses
    inputs = {
        "hidden": torch.randn(tokens, hidden, generator=generator).to(device, dtype),
        "last_index": torch.arange(RESPONSE_LENGTH - 1, tokens, RESPONSE_LENGTH, device=device),
        "weight": (torch.randn(1, hidden, generator=generator) / hidden**0.5).to(device, dtype),
        "bias": torch.zeros(1, device=device, dtype=dtype),
        "norm_weight": torch.ones(hidden, device=device, dtype=dtype),
        "labels": torch.arange(responses, device=device) % 2 == 0,
        "norm": float(responses),
    }
    states, rows = inputs["hidden"], inputs["hidden"][:responses]
    return Case(
        "discriminator_head",
        f"discriminator_head T={tokens} N={responses} H={hidden}",
        inputs,
        {
            BASELINE: lambda **inputs: discriminator_head(**inputs, final_norm="rms", backend="reference").loss,
            "ril_kernels": lambda **inputs: discriminator_head(**inputs, final_norm="rms").loss,
            **discriminator_peers(device),
        },
        {NO_GRAD: [rows.clone], BOTH: [lambda: (rows.clone(), torch.zeros_like(states))]},
        "a copy of the N rows; T rows of zeros for d(hidden) with the gradient",
        {NO_GRAD: 2 * responses * hidden, BOTH: 4 * responses * hidden},
        num_bytes=(responses + tokens) * hidden * states.element_size(),
        grad=("hidden", "weight", "bias", "norm_weight"),
    )


def sampling_case(name: str, rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    """Candidates return both log-probs of a token: their own, for a peer that draws by other random numbers ours, after
    it has drawn one. Each call starts from the same `seen`, so it copies it: 1/32 of the bytes of the logits."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (rows, 512), generator=generator).to(device)
    banned = token_bits(torch.arange(vocabulary - 20, vocabulary, device=device), vocabulary)
    options = SAMPLING[name]
    bits = token_bits(prompts, vocabulary) if "repetition_penalty" in options else None
    row = torch.arange(rows, device=device)
    inputs = {"logits": (4 * torch.randn(rows, vocabulary, generator=generator)).to(device, dtype)}
    fixed = {"seed": torch.tensor(0, device=device), "question": row, "sample_number": row, "position": row}
    fixed |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **options, "banned": banned}

    def run(function: Callable, logits: Tensor) -> Tensor:
        return torch.stack(function(logits, **fixed, seen=None if bits is None else bits.clone())[1:])

    token = sample_reference(**inputs, **fixed, seen=None if bits is None else bits.clone()).token
    candidates = {
        BASELINE: partial(run, sample_reference),
        "ril_kernels": partial(run, sample),
        **sampling_peers(partial(run, sample_reference), prompts, token, vocabulary, options, device),
    }
    return Case(
        "sampling",
        f"sampling {name} B={rows} V={vocabulary}",
        inputs,
        candidates,
        {NO_GRAD: [lambda: inputs["logits"].amax(1)]},
        "one read of the logits, amax",
        num_bytes=inputs["logits"].numel() * inputs["logits"].element_size(),
    )


def all_cases(device: str, full: bool = False) -> list[tuple[str, str, Callable[[], Case]]]:
    """(op, what it is about, builder): cases are built one at a time, since the large ones hold gigabytes."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens, less_hidden, less_vocabulary = SIZES[device, full and device == "cpu"]
    cases = []
    for op, build in (("token_logprob", token_logprob_case), ("policy_loss", policy_loss_case)):
        for name, (hidden, vocabulary) in MODELS.items():
            if less_hidden > 1 and name in ALIKE:
                continue
            if name == "small":
                shape = (4096, hidden, vocabulary)
            else:
                shape = (tokens, hidden // less_hidden, vocabulary // less_vocabulary)
                name += "" if less_hidden == 1 else f" (H/{less_hidden}, V/{less_vocabulary})"
            cases.append((op, name, partial(build, name, *shape, dtype, device)))
            if op == "policy_loss" and name.startswith("Qwen2.5-0.5B"):
                cases.append((op, f"{name}, idle", partial(build, name, *shape, dtype, device, idle_half=True)))
    if device == "cpu":
        for num in (64, 65_536):
            cases.append(("group_advantages", f"N={num}", partial(group_advantages_case, num, device)))
    for hidden in (896, 2048):
        # The states of 4,096 responses are a GiB.
        for num in (1, 16, 128, *((1024, 4096) if full or device == "cuda" else ())):
            shape = (num, hidden, dtype, device)
            cases.append(("discriminator_head", f"N={num} H={hidden}", partial(discriminator_head_case, *shape)))
    rows = 64 if device == "cuda" or full else 8
    for name in SAMPLING:
        cases.append(("sampling", name, partial(sampling_case, name, rows, MODELS["Qwen2.5-VL-3B"][1], dtype, device)))
    cases += attention_cases.all_cases(dtype, device, full) + packing_cases.all_cases(dtype, device, full)
    return cases + rollout_cases.all_cases(dtype, device) + step_cases.all_cases(dtype, device, full)
