"""Errors that are the user's to mend."""


class UserError(Exception):
    """A mistake of the user's: the message names the file, the field and the fix, and is all they see."""
