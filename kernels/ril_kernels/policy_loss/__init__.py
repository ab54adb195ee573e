"""rewards -> group advantage -> ratio, clip, KL -> loss and gradients."""

from ril_kernels.policy_loss.advantages import group_advantages
from ril_kernels.policy_loss.op import policy_loss
from ril_kernels.policy_loss.reference import PolicyMetrics

__all__ = ["PolicyMetrics", "group_advantages", "policy_loss"]
