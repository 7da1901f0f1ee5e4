"""The one exception that is the user's to mend."""


class NarrowlyError(Exception):
    """A user's mistake, told so that the user can mend it.

    The message names the file, line, field or module and the remedy. The command line prints it
    without a traceback and exits with code 2; everything else that escapes is a bug of ours.
    """
