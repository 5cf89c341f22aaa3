"""What goes wrong with data."""

from jpeft.errors import JpeftError


class DataError(JpeftError):
    """A file of examples is broken, or lacks what training on it needs. Names file, line, expected and found."""
