"""What is said of a value that cannot work."""


class ConfigError(ValueError):
    """A value that cannot work; the message names the value, the limit and the fix."""


def check(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)
