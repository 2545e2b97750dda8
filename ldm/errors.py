"""The exceptions that are meant for the person at the keyboard."""


class ConfigError(ValueError):
    """Something that was asked for cannot be: the message says what, why, and what to type instead.

    `ldm.run` prints it as one line without a traceback and exits with code 2; in a sweep the arm is marked refused.
    """


class NotFinite(ConfigError):
    """Numbers that are NaN or infinite where a picture or weights should be: the message says where they come from."""


class SweepError(ConfigError):
    """What is wrong with every arm of a sweep alike: it ends the sweep instead of marking an arm refused."""


class Ended(BaseException):
    """Carries an error past Hydra to `ldm.run`: Hydra catches every Exception, prints it, and goes on with a sweep."""

    def __init__(self, error: BaseException):
        super().__init__(error)
        self.error = error
