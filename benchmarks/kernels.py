"""Triton kernels, compiled ahead of time for three GPU generations, without a GPU: ours in all their forms, and those
of Liger and cut-cross-entropy that stand where ours do, as they launch them."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import ril_kernels
from benchmarks.cases import MODELS, RESPONSE_LENGTH, SIZES
from ril_kernels.discriminator_head.fused import NORMS
from ril_kernels.policy_loss.reference import ADVANTAGE_KINDS

try:
    from liger_kernel.ops import cross_entropy, grpo_loss, rms_norm
except ImportError:
    cross_entropy = None
try:
    from cut_cross_entropy import cce_backward, cce_lse_forward, indexed_dot, tl_autotune
except ImportError:
    tl_autotune = None

HEAD = "Qwen2.5-VL-3B"  # whose H and V the peers' constants are of
TOKENS = SIZES["cuda", False][0]
TARGETS = (80, 90, 100)  # compute capability: A100, H100, B200
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# The type of each argument, by name; VALUES are compiled for every dtype. Pointers are divisible by 16, as PyTorch's
# allocator gives them.
VALUES = "*values"
ARGUMENTS = {
    **dict.fromkeys(("logits", "hidden", "weight", "bias", "norm_weight", "norm_bias"), VALUES),
    **dict.fromkeys(("grad_hidden", "grad_weight", "grad_bias", "grad_norm_weight", "grad_norm_bias"), VALUES),
    **dict.fromkeys(("temperature", "logprob", "entropy", "grad_logprob", "grad_entropy"), "*fp32"),
    **dict.fromkeys(("rewards", "advantages", "labels", "label_weights", "logit", "score", "reward"), "*fp32"),
    **dict.fromkeys(("loss", "row_loss", "stats", "grad_logit", "grad_loss"), "*fp32"),
    **dict.fromkeys(
        ("last_index", "target", "groups", "seed", "question", "sample_number", "position", "token"), "*i64"
    ),
    **dict.fromkeys(("policy_logprob", "sampling_logprob"), "*fp32"),
    **dict.fromkeys(("banned", "seen", "ids", "finished"), "*i32"),
    "lse": "*fp64",
    **dict.fromkeys(("softcap", "tau", "rate", "penalty", "eps", "smoothing", "denominator"), "fp32"),
    "top_p": "fp64",
    "stride": "i64",
    **dict.fromkeys(("num_vocab", "num_hidden", "num_responses", "top_k", "flags"), "i32"),
}
# Strides and widths that are a multiple of 16 where rows are padded.
WHOLE = ("stride", "num_hidden", "X_stride", "n_cols", *(f"{name}_row_stride" for name in ("X", "Y", "dX", "dY", "dW")))
# Of cut-cross-entropy, with TOKENS tokens of HEAD.
CCE_WHOLE = ("B", "D", "V", "B_BIN", "stride_eb", "stride_cv")
CCE_WHOLE += ("num_locks", "n_de_locks_0", "n_de_locks_1", "n_dc_locks_1")
# The values that a launcher passes for a constant; for any other it passes its module's constant of that name.
CHOICES = {"CAPPED": (False, True), "PADDED": (True, False), "KIND": ADVANTAGE_KINDS, "NORM": NORMS}
# What training runs of them, in bfloat16.
TRAINING = {"CAPPED": False, "PADDED": True, "KIND": "dr_grpo", "NORM": "rms"}


@dataclass(frozen=True)
class Form:
    """A kernel with all that its launcher fixes at compile time."""

    kernel: triton.JITFunction
    dtype: str
    constants: dict[str, object]
    num_warps: int
    num_stages: int = 3  # Triton's default
    arguments: Mapping[str, str] = field(default_factory=lambda: ARGUMENTS)
    library: str = "ril_kernels"

    def __str__(self) -> str:
        choices = [f"{name}={value}" for name, value in self.constants.items() if name in CHOICES]
        return " ".join([self.kernel.__name__, self.dtype, *choices])

    def compile(self, target: int) -> CompiledKernel:
        names = self.kernel.arg_names
        types = {name: "constexpr" if name in self.constants else self.arguments[name] for name in names}
        types = {name: f"*{DTYPES[self.dtype]}" if each == VALUES else each for name, each in types.items()}
        wide = (*WHOLE, *CCE_WHOLE) if self.padded else ()
        aligned = [name for name, each in types.items() if each[0] == "*" or name in wide]
        source = ASTSource(
            self.kernel,
            types,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)

    @property
    def padded(self) -> bool:
        """Whether rows begin and end at a multiple of 16 elements, as every model's hidden states do."""
        return bool(self.constants.get("PADDED", any(name in (*WHOLE, *CCE_WHOLE) for name in self.kernel.arg_names)))

    @property
    def trains(self) -> bool:
        """Whether this is the form that training runs."""
        usual = all(TRAINING.get(name, value) == value for name, value in self.constants.items())
        varies = any(self.arguments.get(name) == VALUES for name in self.kernel.arg_names)
        return usual and self.dtype == ("bfloat16" if varies else "float32")


def forms() -> Iterator[Form]:
    """Every `*_kernel` of every triton.py of ril_kernels, in every dtype and with every choice of its constants."""
    for info in pkgutil.walk_packages(ril_kernels.__path__, "ril_kernels."):
        if not info.name.endswith(".triton"):
            continue
        module = importlib.import_module(info.name)
        for name, kernel in vars(module).items():
            if not name.endswith("_kernel"):
                continue
            constants = [each for each in kernel.arg_names if each not in ARGUMENTS]
            values = [CHOICES[each] if each in CHOICES else (getattr(module, each),) for each in constants]
            varies = any(ARGUMENTS.get(each) == VALUES for each in kernel.arg_names)
            dtypes = DTYPES if varies else ("float32",)
            for dtype, *chosen in itertools.product(dtypes, *values):
                yield Form(kernel, dtype, dict(zip(constants, chosen, strict=True)), module.NUM_WARPS)


# Liger's arguments, as ARGUMENTS; what it is not given is a constant.
LIGER = {
    **dict.fromkeys(("LOGITS", "DLOGITS", "X_ptr", "Y_ptr", "W_ptr", "dX_ptr", "dY_ptr"), VALUES),
    **dict.fromkeys(
        ("OLD_LOGP", "REF_LOGP", "ADVANTAGES", "LOSS", "DLOSS", "LSE", "KL", "IS_CLIPPED", "LOG_P"), "*fp32"
    ),
    **dict.fromkeys(("loss_ptr", "RSTD_ptr", "dW_ptr"), "*fp32"),
    **dict.fromkeys(("INPUT_IDS", "COMPLETION_MASK", "MASK"), "*i64"),
    **dict.fromkeys(WHOLE, "i32"),
    **dict.fromkeys(("n_non_ignore", "sum_non_ignore_weight", "ignore_index", "n_rows", "rows_per_program"), "i32"),
    **dict.fromkeys(("VLLM_IS_RATIO_STRIDE", "loss_stride0", "stride_input_ids_b", "stride_mask_b"), "i32"),
    **dict.fromkeys(("token_accuracy_stride", "predicted_tokens_stride", "stride_mask_l"), "i32"),
    **dict.fromkeys(("weight_sum", "eps", "offset"), "fp32"),
}


def liger_forms() -> Iterator[Form]:
    """The kernels of its fused linear cross-entropy, its GRPO loss and its RMSNorm in bfloat16, with the constants that
    its launchers pass for a head of Qwen2.5-VL-3B. Its fused linear GRPO loss is torch.compile's, and has none."""
    if cross_entropy is None:
        return
    hidden, vocab = MODELS[HEAD]
    missing = ("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap")
    no = ("RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY", "RETURN_PREDICTED_TOKENS", "HAS_WEIGHT", "HAS_SOFTCAPPING")
    loss = {"lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "none", "HAS_GRADIENTS": True}
    loss |= {"Y_stride": 1, "loss_stride": 1, "BLOCK_SIZE": cross_entropy.MAX_FUSED_SIZE}
    loss |= dict.fromkeys(missing) | dict.fromkeys(no, False)
    yield _liger(cross_entropy.liger_cross_entropy_kernel, loss, 32, arguments={**LIGER, "Y_ptr": "*i64"})
    shape = {"L": RESPONSE_LENGTH, "N": vocab, "TEMPERATURE": 1.0}
    strides = {"stride_input_ids_l": 1, "MASK": None}
    yield _liger(grpo_loss._selective_log_softmax_kernel, {**shape, **strides, "BLOCK_N": 2048}, 1, 4)
    terms = {**shape, "BETA": 0.01, "EPS_LOW": 0.2, "EPS_HIGH": 0.2, "LOSS_TYPE": 0, "SAPO_TEMP_POS": 1.0}
    terms |= {"SAPO_TEMP_NEG": 1.05, "DELTA": 0.0, "USE_BIAS_CORRECTION_KL": False, "VLLM_IS_RATIO": None}
    terms |= {"PHI_SEQ": None}
    yield _liger(grpo_loss._grpo_loss_fwd_kernel, {**terms, "BLOCK_N": 2048}, 1, 2)
    yield _liger(grpo_loss._grpo_loss_bwd_kernel, {**terms, "loss_stride1": 1, "BLOCK_N": 4096}, 16, 1)
    block, num_warps = rms_norm.calculate_settings(hidden)
    norm = {"W_row_stride": 1, "RSTD_row_stride": 1, "casting_mode": rms_norm._CASTING_MODE_LLAMA.value}
    norm |= {"elementwise_affine": True, "BLOCK_SIZE": block}
    yield _liger(rms_norm._rms_norm_forward_kernel, norm, num_warps)
    norm = {**norm, "X_dtype": tl.bfloat16, "COMPUTE_DW": True}
    yield _liger(rms_norm._rms_norm_backward_kernel, norm, num_warps)


def _liger(kernel, constants: dict, num_warps: int, num_stages: int = 3, arguments: Mapping[str, str] = LIGER) -> Form:
    return Form(kernel, "bfloat16", constants, num_warps, num_stages, arguments, "liger-kernel")


# cut-cross-entropy's arguments, likewise: E and C are the hidden states and lm_head, LA the logits' sums.
CCE = {
    **dict.fromkeys(("E", "C", "dE", "dC"), VALUES),
    **dict.fromkeys(("LSE", "LA", "Out", "dOut"), "*fp32"),
    **dict.fromkeys(("Targets", "Inds"), "*i64"),
    **dict.fromkeys(("VocabOrdering", "dELocks", "dCLocks"), "*i32"),
    "Locks": "*u32",
    **dict.fromkeys((*CCE_WHOLE, "n_dc_locks_0"), "i32"),
    **dict.fromkeys(("grad_scale", "filter_eps"), "fp32"),
}


def cce_forms() -> Iterator[Form]:
    """The kernels of its loss of each token in bfloat16, for TOKENS tokens of a head of Qwen2.5-VL-3B: every token
    counts, both matrices get gradients, and its filter is on, as by default. Their tile sizes are those that it takes
    on any GPU; only with CCE_AUTOTUNE, which is off by default, would it time others there."""
    if tl_autotune is None:
        return
    yield _cce(cce_lse_forward._cce_lse_forward_kernel, tl_autotune._cce_forward_best_config())
    yield _cce(cce_backward._cce_backward_kernel, tl_autotune._cce_backward_best_config())
    yield _cce(indexed_dot._indexed_neg_dot_forward_kernel, tl_autotune._indexed_dot_best_config())


def _cce(kernel, config: triton.Config) -> Form:
    """Its wrappers choose constants by the launcher's arguments: by D, by which there are, and by the size of dOut."""
    values = {**dict.fromkeys(CCE, torch.empty(TOKENS, device="meta")), "D": MODELS[HEAD][0], **config.kwargs}
    values |= {"Valids": None, "softcap": None, "SHIFT": False, "REQUIRES_GRAD": True}
    values |= dict.fromkeys(("stride_ed", "stride_cd", "stride_lse_b", "stride_vb", "stride_ib"), 1)
    while not isinstance(kernel, triton.JITFunction):
        for name, choose in getattr(kernel, "values", {}).items():  # triton.autotune's wrapper has none
            values[name] = choose(values)
        kernel = kernel.fn
    constants = {name: values[name] for name in kernel.arg_names if name not in CCE}
    return Form(kernel, "bfloat16", constants, config.num_warps, config.num_stages, CCE, "cut-cross-entropy")
