"""What can go wrong, by name. Every error a user can cause is one of these, a ValueError or a TypeError."""


class HedgeSpecError(Exception):
    """Base of the package's own errors."""


class BackendUnavailableError(HedgeSpecError, RuntimeError):
    """A backend was asked for by name and cannot run here; `__cause__` keeps why, the message says how to get it."""


class CheckpointError(HedgeSpecError, ValueError):
    """Weights that are missing, corrupt, of the wrong shape, or in a format that is not safe to load."""


class ContextError(HedgeSpecError, ValueError, IndexError):
    """A text that goes past the table of positions of a model, where plain decoding fails with an IndexError."""


class EngineError(HedgeSpecError, RuntimeError):
    """An engine of a version, or in a configuration, in which HedgeSpec cannot work."""


class LearnerStateError(HedgeSpecError, ValueError):
    """A learner's state, as saved, that cannot be read, or that is not this decoder's."""


class PoolError(HedgeSpecError, ValueError):
    """A pool of drafters, given to an engine, that cannot be read, or that the engine cannot run."""


class TargetLogitsError(HedgeSpecError, RuntimeError, ValueError):
    """Logits of the target from which no token can be taken: NaN, +inf, or -inf throughout."""


class VocabularyMismatchError(HedgeSpecError, ValueError):
    """A drafter whose token ids do not mean what the target's mean."""


class ZooError(HedgeSpecError, RuntimeError):
    """The embedded zoo cannot be prepared: a download failed, a checksum differs, a tool is missing."""
