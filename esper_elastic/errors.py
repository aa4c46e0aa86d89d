"""Every exception that esper_elastic raises on its own account.

A message says where, what, what was expected and what was got, and the remedy; whoever catches one finds the model exactly as it was.
Errors that a caller's value caused are :class:`ValueError` too, so that code written for plain PyTorch keeps catching them.
"""


class ElasticError(Exception):
    """Base of every error of this package."""


class CapacityError(ElasticError, ValueError):
    """A width or an index set that a dim cannot take: zero, beyond capacity, not a multiple, not an integer."""


class UnknownDimError(CapacityError, KeyError):
    """A name that no dim, block or layer of the model has."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class StateDictError(CapacityError, RuntimeError):
    """A ``state_dict`` whose widths or shapes the model cannot take; also the :class:`RuntimeError` that ``nn.Module`` would raise."""


class LayoutError(ElasticError, ValueError):
    """An operand whose width or layout is not the one that the layer has now."""


class ConversionError(ElasticError, ValueError):
    """A model that cannot be made elastic as it stands, or example inputs that it does not take."""


class OwnerError(ElasticError, RuntimeError):
    """A commit from a thread that does not own the control block."""


class GenerationError(ElasticError, RuntimeError):
    """A backward pass through a graph that was built before the last commit of its control block."""


class GraphCaptureError(ElasticError, RuntimeError):
    """Something that a CUDA graph cannot record, or would record wrongly."""


class OptimizerError(ElasticError, ValueError):
    """An optimizer that cannot be served, or that holds state nobody guards."""


class CheckpointError(ElasticError, ValueError):
    """A checkpoint that cannot be written, or one that the model or the optimizer cannot take."""


class CalibrationError(ElasticError, ValueError):
    """Batches that no statistics can be taken from."""


class SurgeryError(ElasticError, ValueError):
    """An edit of the model's structure that was refused."""


class TopologyError(SurgeryError):
    """An edit that the model's graph does not allow."""


class TransactionError(SurgeryError):
    """A transaction that could not be completed, or was used for what it does not cover."""


class MonitorError(ElasticError, ValueError):
    """A record of a run that cannot be read, or of which there is none."""
