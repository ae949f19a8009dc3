"""Typed failures. Each says what is wrong, where, and what to do; `exit_code` is what the `r1mega` command returns."""

EXIT_SAVED_FOR_REQUEUE = 85
"""Exit status of a run that was asked to stop (SIGTERM, SIGUSR2), saved its state and can be started again."""

EXIT_FILE = 11
"""Exit status for a file or directory that the system does not give: no permission, a full disk, a read-only one."""


EXIT_STALLED = 12
"""Exit status of all ranks of a job that the watchdog ended: a rank gave no sign, or none got on."""


class R1MegaError(Exception):
    """Base of every error that the user can act on; printed without a traceback by the command line."""

    exit_code = 1


class ConfigError(R1MegaError):
    """A config file, key, value or layout that cannot work. Raised before any process group starts."""

    exit_code = 2


class DataError(R1MegaError):
    """A data file that is missing, malformed or does not fit the run (the message names file:line)."""

    exit_code = 3


class CheckpointError(R1MegaError):
    """A checkpoint that is missing, torn, altered, or of another architecture."""

    exit_code = 4


class WeightSyncError(R1MegaError):
    """The proof of a weight transfer failed: the generator does not hold the trainer's weights."""

    exit_code = 5


class PlatformError(R1MegaError):
    """A device, library or patch target that a run needs and this machine does not have."""

    exit_code = 6


class GenerationError(R1MegaError):
    """The generator could not be built or could not answer a request."""

    exit_code = 7


class FreshProcessNeeded(GenerationError):
    """The generator can be built, but not by this process, which has had one; `r1mega train` then starts itself anew."""


class RewardError(R1MegaError):
    """A reward that cannot be computed for a reason that a retry does not mend (bad config, missing tool)."""

    exit_code = 8


class NonFiniteError(R1MegaError):
    """A loss or gradient norm that is not finite."""

    exit_code = 9


class StragglerError(R1MegaError):
    """A rank that the others waited for did not come in time, or ended."""

    exit_code = 10
