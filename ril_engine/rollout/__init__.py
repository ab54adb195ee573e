"""Generation in the trainer's own weights. Read engine.py, then cache.py (shared prompts), schedule.py and graphs.py;
padded.py is for families that cannot read packs."""

from ril_engine.config import SamplingConfig
from ril_engine.families import why_not_packable
from ril_engine.models import Encoder
from ril_engine.rollout.engine import Rollout
from ril_engine.rollout.padded import PaddedRollout
from ril_engine.rollout.response import Response, seed_of

__all__ = ["PaddedRollout", "Response", "Rollout", "rollout", "seed_of"]


def rollout(model, encoder: Encoder, sampling: SamplingConfig) -> Rollout | PaddedRollout:
    """The generation that the model's family allows."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    packs = hasattr(decoder, "norm") and why_not_packable(decoder.config) is None
    return (Rollout if packs else PaddedRollout)(model, encoder, sampling)
