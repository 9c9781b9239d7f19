"""The error that a user caused and can mend; every command turns it into one clear line and exit code 2."""

BAD_INPUT_EXIT_CODE = 2


class UserError(Exception):
    """Bad input: the message names the field or file, the value, and the way out."""
