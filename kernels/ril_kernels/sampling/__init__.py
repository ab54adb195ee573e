"""Logits -> a token of each row, its log-prob under the policy and under the sampling distribution."""

from ril_kernels.sampling.op import Sample, sample, token_bits

__all__ = ["Sample", "sample", "token_bits"]
