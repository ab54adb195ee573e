"""RIL: unified reinforcement and imitation learning for vision-language models, the training engine."""

__version__ = "0.1.0"
