"""hidden, lm_head -> log-prob and entropy of each target token."""

from ril_kernels.token_logprob.op import token_logprob

__all__ = ["token_logprob"]
