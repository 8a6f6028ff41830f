"""What stops a start: one class a reason, one line a message, never a password."""

from collections.abc import Sequence


class BootstrapError(Exception):
    """A start that cannot go on; str(error) is the one line an operator reads."""


class ServerUnreachable(BootstrapError):
    """No server answers, or the one that does takes no connections now: worth another try."""


class AccessRefused(BootstrapError):
    """The server is up and says no: a wrong password, an unknown role, a missing right."""


class DatabaseMissing(BootstrapError):
    """The database is not there and could not be created."""


class LockTimeout(BootstrapError):
    """Another bootstrap of this database did not finish in time."""


class Blocked(BootstrapError):
    """Other sessions held a table for longer than a change to it may wait."""


class Interrupted(BootstrapError):
    """Whoever waited for the bootstrap does not any more; it can be run again."""


class InUse(BootstrapError):
    """Other sessions are in a database that was to be dropped."""


class NotAdopted(BootstrapError):
    """The database has tables of ours that Rollcall did not make and may not touch yet."""


class CannotAdopt(BootstrapError):
    """The tables that are there cannot be adopted; `problems` names every reason."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("this database cannot be adopted: " + "; ".join(self.problems))
