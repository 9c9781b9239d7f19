"""The error that a user caused and can mend; every command turns it into one clear line and exit code 2."""

import errno

BAD_INPUT_EXIT_CODE = 2

# errno -> what a user calls it
FULL_DISK = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the size of a file is reached",
}


class UserError(Exception):
    """Bad input: the message names the field or file, the value, and the way out."""
