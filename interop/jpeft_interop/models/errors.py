"""What goes wrong with a model: its config, its params, its inputs."""

from jpeft.errors import JpeftError


class ModelError(JpeftError):
    """A model that is not supported, or inputs or params that do not fit it. Names what was found and what is known."""
