"""Everything jpeft raises on purpose. All are ValueErrors, so that one `except` suffices.

JpeftError
├── SpecError        a spec that means nothing: no such target, a bad hyperparameter, a spec where an adapter belongs
├── KernelError      a weight that the method can't act on, or whose geometry is not known
├── ShardingError    where an adapter is to live on a mesh can't be told from where its base lives
├── LiftError        the fast path can't do what was asked: an adapted weight never read, an nnx.Module argument
├── MergeError       folding in would be wrong: a value that is not finite, a tie that would break
├── AdapterError     an adapter's file or folder that is broken, foreign, or does not fit the params
└── WeightsError     weights (file, folder or torch module) that are broken, foreign, or do not fit the model

jpeft_interop adds its own below JpeftError: ModelError, DataError and kin, each beside what raises it.
"""


class JpeftError(ValueError):
    """The root of the tree; catch it to catch all of them."""


class SpecError(JpeftError):
    """A spec, a target or a hyperparameter means nothing for these params."""


class KernelError(JpeftError):
    """A weight that the method can't act on, or whose geometry is not known."""


class ShardingError(JpeftError):
    """Where an adapter lives on a mesh can't be told from the params."""


class LiftError(JpeftError):
    """The lifted function can't honour what was attached."""


class MergeError(JpeftError):
    """Folding an adapter into plain params would be wrong."""


class AdapterError(JpeftError):
    """An adapter's file is broken, foreign, or does not fit the params. Names file, key, expected and found."""


class WeightsError(JpeftError):
    """A model's weights are broken, foreign, or do not fit the model. Names file, key, expected and found."""
