"""A warning when the discriminator has stopped to be a useful teacher."""

from __future__ import annotations

SATURATED, FOOLED, PATIENCE = 0.95, 0.55, 50  # accuracy above or below for so many steps in a row


class Watch:
    """Counts steps on which D is saturated, or fooled, and warns once when they are PATIENCE in a row."""

    def __init__(self):
        self.state, self.steps = "healthy", 0

    def __call__(self, metrics: dict[str, float]) -> str | None:
        """A warning where this step completes a row. Feed it all steps in order; after a resume, those before too."""
        found = metrics.get("discriminator/accuracy")
        if found is None:
            return None
        state = "saturated" if found > SATURATED else "fooled" if found < FOOLED else "healthy"
        self.steps = self.steps + 1 if state == self.state else 1
        self.state = state
        if state == "healthy" or self.steps != PATIENCE:
            return None
        if state == "saturated":
            return (
                f"discriminator/accuracy was above {SATURATED} for {PATIENCE} steps in a row: D is saturated and its "
                "rewards no longer tell better from worse responses; try discriminator.label_smoothing, a higher "
                "discriminator.temperature, a lower discriminator.learning_rate, discriminator.max_accuracy or fewer "
                "rl.updates_per_step, and look for a form that gives one side away"
            )
        return (
            f"discriminator/accuracy was below {FOOLED} for {PATIENCE} steps in a row: D is fooled and its rewards are "
            "near chance; try a higher discriminator.learning_rate, more rl.updates_per_step or longer "
            "discriminator.pretrain, unless the student has come to write as its teachers do"
        )
