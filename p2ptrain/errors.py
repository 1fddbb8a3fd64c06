"""The error tree. Its first split is whose fault it is: ours and our user's, or a peer's and the network's.

A message says what was expected, what was seen, where, and what to do; commands print it as one sentence and
exit with `exit_code`. No traceback ever reaches a user for anything below `P2PTrainError`; a bug of ours is
any other exception, and crashes.
"""

from __future__ import annotations


class P2PTrainError(Exception):
    """Root of everything p2ptrain raises on purpose."""

    exit_code = 1


# -- LocalFault: something on this machine, in this user's files or in this user's command -------------------


class LocalFault(P2PTrainError):
    """The cause is on this side: configuration, disk, port, device, data."""

    exit_code = 2


class ConfigError(LocalFault):
    """A run file, peer file or option is not valid."""


class InviteError(LocalFault):
    """The invite is damaged, expired, revoked, or is not one of ours."""


class CorpusError(LocalFault):
    """The training data is missing, empty or too small."""

    exit_code = 5


class StorageError(LocalFault):
    """A folder cannot be written or a file cannot be read: full, read-only, not there."""

    exit_code = 6


class CheckpointError(LocalFault):
    """A checkpoint is damaged, incomplete, or of another run."""

    exit_code = 7


class AdapterError(LocalFault):
    """An adapter folder is damaged, is for another base, or cannot be combined as asked."""

    exit_code = 7


class PortBusy(LocalFault):
    """The address to listen on is taken by another process."""

    exit_code = 8


class NotRunning(LocalFault):
    """A command is for a peer that runs on this machine, and none does, or it does not answer."""

    exit_code = 9


class DeviceError(LocalFault):
    """The device to compute on is missing, lacks memory, or gives numbers that cannot be used."""

    exit_code = 10


class IncompatibleRun(LocalFault):
    """This peer and the swarm do not train the same thing; the message names the field that differs."""

    exit_code = 3


# -- PeerFault: a peer or the network ------------------------------------------------------------------------


class PeerFault(P2PTrainError):
    """A peer or the network did not do what was asked; counted, survived, and named."""

    exit_code = 4


class Unreachable(PeerFault):
    """No connection could be made, or it broke, or nothing came before the deadline."""


class BadMessage(PeerFault):
    """A peer sent something malformed, oversized or out of contract."""


class Refused(PeerFault):
    """A peer answered, and its answer was no; the message carries its reason."""


class Uninvited(Refused):
    """A peer does not let us in, because of the invite that we show; the message carries its reason."""


class OtherVersion(Refused):
    """A peer speaks another version of the protocol; `theirs` says which."""

    def __init__(self, message: str, theirs: int) -> None:
        super().__init__(message)
        self.theirs = theirs
