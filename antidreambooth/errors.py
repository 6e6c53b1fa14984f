"""The one kind of error that is the user's to mend: shown as one line, without a traceback."""


class InputError(Exception):
    """Something the user gave cannot be used; the message names it and the fix."""
