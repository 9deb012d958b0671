"""Errors that a user can fix: each message says what was wrong, what was got and what to do."""


class UserError(ValueError):
    """Base of the errors below."""


class SettingsError(UserError):
    """A setting that is out of range, unknown, or does not fit what it is for."""


class ModelError(UserError):
    """A model that cannot be loaded or captured."""


class TextError(UserError):
    """A text that cannot be run: empty, too short, too long, or no text at all."""


class RecordError(UserError):
    """A record (run, study, plan, results) that cannot be read (corrupt, foreign, of a newer version) or written."""


class OutOfMemoryError(UserError):
    """Work that needs more memory than is free."""
