"""The one exception that is meant for the person at the keyboard."""


class ConfigError(ValueError):
    """Something that was asked for cannot be: the message says what, why, and what to type instead.

    `ldm.run` prints it as one line without a traceback and exits with code 2; in a sweep the arm is marked refused.
    """
