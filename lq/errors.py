"""Every error and warning lq raises; each message says what was given, what was expected and what to do."""


class LqError(Exception):
    """Base of all errors raised by lq."""


class SpecError(LqError, ValueError):
    """A quantizer was asked for that cannot exist: a wrong bit-width, a wrong number of channels."""


class PatternError(LqError, ValueError):
    """A name pattern matches no layer of the model."""


class StateError(LqError, RuntimeError):
    """The model is in the wrong state for the call: not attached, not calibrated, already attached."""


class DataError(LqError, ValueError):
    """The data cannot be used: no batches, NaN or Inf, a batch the model does not take."""


class WriteError(LqError, OSError):
    """A file cannot be written: no such folder, no permission, no room on the disk; the old one is as it was."""


class BudgetError(LqError, ValueError):
    """No allocation meets the budgets; the message states what is feasible."""


class RecipeError(LqError, ValueError):
    """A recipe does not exist, names something else than callbacks or wrong arguments, or takes no such override."""


class NoEffectWarning(UserWarning):
    """A call was valid but changed nothing, or less than it was probably meant to."""


class DivergenceError(LqError):
    """Training diverged: the loss is not a finite number."""


class DivergenceWarning(UserWarning):
    """Training goes the wrong way, or the range of a quantizer has left its values."""
