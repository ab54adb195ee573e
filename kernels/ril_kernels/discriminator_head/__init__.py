"""Last-token gather, H x 1 score, BCE, similarity reward."""

from ril_kernels.discriminator_head.op import discriminator_head, discriminator_loss, similarity_reward

__all__ = ["discriminator_head", "discriminator_loss", "similarity_reward"]
