"""The `sft-jax` command: puts the process in order, then hands over to `cli.py`."""

import os
import sys

from sft_jax import machine
from sft_jax.errors import ProcessError, SftError

COMPUTING = {"train", "evaluate", "predict", "chat"}
NO_HOME = "home directory"  # what `Path.expanduser` says where there is none


def main() -> None:
    """Run the command line; a user's mistake ends in one message and its exit code, never in a traceback."""
    machine.speak_utf8()
    try:
        machine.quiet()
        if COMPUTING & set(sys.argv[1:2]):
            machine.relaunch_with_huge_pages()
        from sft_jax.cli import app

        if COMPUTING & set(sys.argv[1:2]):
            machine.keep_programs()
            machine.tune()
        app()
    except ProcessError as error:
        _leave(error)
    except SftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # who reads has seen enough
        sys.exit(141)
    except UnicodeEncodeError as error:  # of a file's name, under a locale that is not UTF-8
        print(SftError(f"{error.object!r:.200}: has no name in {error.encoding}; set LC_ALL=C.UTF-8"), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = error.filename or "file system"
        print(SftError(f"{where}: {error.strerror or error}; mend that, and try again"), file=sys.stderr)
        sys.exit(74)
    except Exception as error:
        if isinstance(error, RuntimeError) and NO_HOME in str(error):
            print(SftError("~: no directory is known for it; set HOME, or write whole paths"), file=sys.stderr)
            sys.exit(2)
        why = sys.modules["sft_jax.mesh"].lost_peer(error) if "sft_jax.mesh" in sys.modules else None
        if why is None:
            raise
        _leave(ProcessError(f"another process of the run is gone ({why}); start all of them again, and it goes on"))


def _leave(error: ProcessError) -> None:
    """Say what happened and end here: jax would wait for the other processes, and then say it in its own way."""
    print(error, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code)


if __name__ == "__main__":
    main()
