"""Last-token gather, final norm, H x 1 score, BCE, similarity reward."""

from ril_kernels.discriminator_head.op import discriminator_head, discriminator_loss, similarity_reward
from ril_kernels.discriminator_head.reference import DiscriminatorOutput

__all__ = ["DiscriminatorOutput", "discriminator_head", "discriminator_loss", "similarity_reward"]
