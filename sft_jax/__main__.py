"""The `sft-jax` command: puts the process in order, then hands over to `cli.py`."""

import sys

from sft_jax import machine

COMPUTING = {"train", "evaluate", "predict", "chat"}


def main() -> None:
    """Run the command line; a user's mistake ends in one message and its exit code, never in a traceback."""
    machine.quiet()
    if COMPUTING & set(sys.argv[1:2]):
        machine.relaunch_with_huge_pages()
    from sft_jax.cli import app
    from sft_jax.errors import SftError

    try:
        if COMPUTING & set(sys.argv[1:2]):
            machine.keep_programs()
            machine.tune()
        app()
    except SftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # who reads has seen enough
        sys.exit(141)
    except OSError as error:
        where = error.filename or "file system"
        print(SftError(f"{where}: {error.strerror or error}; mend that, and try again"), file=sys.stderr)
        sys.exit(74)


if __name__ == "__main__":
    main()
