"""The ways in which a command ends, and the exit status of each."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import click

from streamconv.cli import output
from streamconv.errors import BudgetError, Interrupted, StreamconvError, UsageError, printable

_NO_ROOM = (errno.ENOMEM, errno.EAGAIN)


def status_of(command: Callable[[], int], as_json: bool) -> int:
    """Run a command; show why it failed, if it did.

    Args:
        command: gives its exit status.
        as_json: an error is shown as a JSON object, too.

    Returns:
        the exit status. What is no user's mistake and no limit of the system is raised.
    """
    try:
        return command()
    except click.exceptions.NoArgsIsHelpError as error:
        output.block(error.format_message().split("\n"))
        return 0
    except click.ClickException as error:
        return output.fail(UsageError(error.format_message()), as_json)
    except (StreamconvError, Interrupted) as error:
        return output.fail(error, as_json)
    except (KeyboardInterrupt, click.Abort):
        return output.fail(Interrupted("interrupted", signum=2), as_json)
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return output.fail(UsageError(f"this is longer than a name of a file can be: {printable(str(error.filename))}"), as_json)
        if isinstance(error, FileNotFoundError) and _is_nowhere():
            return output.fail(UsageError("the current folder was removed", hint="go to another one: cd"), as_json)
        if not _lacks_room(error):
            raise
        what = f"the system gives no more memory or threads: {str(error) or type(error).__name__}"
        hint = "raise the limits of address space (ulimit -v), processes (ulimit -u, the pids cgroup) or memory, or use fewer --workers"
        return output.fail(BudgetError(what, hint=hint), as_json)
    except SystemExit as error:  # --help, and click's answer to a closed pipe
        return int(error.code or 0)


def _is_nowhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _lacks_room(error: Exception) -> bool:
    """Whether a limit of the system is behind an error; a library that finds no room for its code raises ImportError."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    told = str(error)
    return isinstance(error, MemoryError) or any(
        text in told for text in ("can't start new thread", "failed to map segment", "annot allocate memory")
    )
