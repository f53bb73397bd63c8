"""When something is done that is not done in every step."""


def is_due(every: int, step: int, num_steps: int) -> bool:
    """After the last step always, otherwise every so many; 0 is never in between."""
    return step == num_steps or (every > 0 and step % every == 0)
