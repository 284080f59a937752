"""The error tree: every error that rapydli_flow raises on purpose.

Each class is also the builtin that a caller would expect to catch. A message names the op or the
object, the rule, both values and the way out.
"""


class RapydliError(Exception):
    """Base of all errors raised by rapydli_flow."""


class ShapeError(RapydliError, ValueError):
    """Shapes, attributes or blocks that do not fit together."""


class DTypeError(RapydliError, TypeError):
    """An array or spec has a dtype that an op or a feed does not take."""


class FormulaError(RapydliError, ValueError):
    """An index formula that cannot be read, or contradicts its operands."""


class GraphError(RapydliError, ValueError):
    """A graph that breaks one of its own rules, or a node that is not there."""


class UnknownOp(RapydliError, KeyError):
    """A serialised graph names an op that is not registered."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class NotDifferentiable(RapydliError, TypeError):
    """A gradient was asked through an op that has none."""


class SettingError(RapydliError, ValueError):
    """A setting or an argument has a value that is not allowed."""


class ArgumentError(RapydliError, TypeError):
    """A function was called with an argument that it does not have."""


class TemplateError(RapydliError, ValueError):
    """A kernel template was asked for what it does not fit, or gave wrong numbers."""


class SpaceError(RapydliError, ValueError):
    """A tuning space that is empty or contradicts itself, or an expression that it does not allow."""


class MissingDependency(RapydliError, ImportError):
    """An optional package, device or server is not there; the message names what to install."""


class DatasetError(RapydliError, ValueError):
    """A dataset that exists but cannot be used: empty, ragged, with labels out of range."""


class DatasetNotFound(RapydliError, FileNotFoundError):
    """No dataset at this address."""


class CorruptChunk(RapydliError, OSError):
    """A stored chunk cannot be decoded; the message has the array's name and the chunk's key."""


class SnapshotError(RapydliError, OSError):
    """A snapshot that is missing, incomplete, or of another network."""


class NonFinite(RapydliError, ArithmeticError):
    """A loss is not finite; the message names the first node whose output is not."""


class TooLittleMemory(RapydliError, MemoryError):
    """A program needs more memory than there is; raised before anything is allocated."""


class NoWorkers(RapydliError, TimeoutError):
    """The cluster did not offer enough workers in time."""


class VersionMismatch(RapydliError, RuntimeError):
    """A worker runs another version than the client: of the package, or of what kernels are made with."""


class DeviceMismatch(RapydliError, RuntimeError):
    """The workers of a run have different kinds of devices, or one cannot use the device that it was given."""


class DeviceFault(RapydliError, RuntimeError):
    """The CUDA driver refused a call, or a kernel failed; the message has the driver's name for the error.

    ``sticky``: nothing works on the card in this process any more. ``kernel``: which it was, if that is known.
    """

    def __init__(self, message: str, *, sticky: bool = False, kernel: str = "") -> None:
        super().__init__(message)
        self.sticky, self.kernel = sticky, kernel


class RunLost(RapydliError, RuntimeError):
    """A rank of a running plan is gone; the run can be resumed from its last snapshot."""
