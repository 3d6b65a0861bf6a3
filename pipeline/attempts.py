"""How often the store has been asked again."""


def take_retries() -> dict[str, int]:
    """Retries since the last call, by cause."""
    return {}
