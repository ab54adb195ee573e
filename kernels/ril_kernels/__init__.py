"""RIL's operations: losses and heads on flat packed tokens, for this engine or for another trainer.

A function's room (the folder of its name) holds every form of it side by side; reference.py defines it.
"""

from ril_kernels.discriminator_head.op import discriminator_head, discriminator_loss, similarity_reward
from ril_kernels.discriminator_head.reference import DiscriminatorOutput
from ril_kernels.policy_loss.advantages import group_advantages
from ril_kernels.policy_loss.op import policy_loss
from ril_kernels.prefix_attention.layout import PackLayout
from ril_kernels.prefix_attention.op import prefix_attention
from ril_kernels.sampling.op import Sample, sample, token_bits
from ril_kernels.token_logprob.op import token_logprob

__all__ = [
    "DiscriminatorOutput",
    "PackLayout",
    "Sample",
    "discriminator_head",
    "discriminator_loss",
    "group_advantages",
    "policy_loss",
    "prefix_attention",
    "sample",
    "similarity_reward",
    "token_bits",
    "token_logprob",
]
