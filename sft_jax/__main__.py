"""The `sft-jax` command: puts the process in order, then hands over to `cli.py`."""

import sys

from sft_jax import machine

COMPUTING = {"train", "evaluate", "predict", "chat"}
NO_HOME = "home directory"  # what `Path.expanduser` says where there is none


def main() -> None:
    """Run the command line; a user's mistake ends in one message and its exit code, never in a traceback."""
    from sft_jax.errors import SftError

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
    except SftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # who reads has seen enough
        sys.exit(141)
    except RuntimeError as error:
        if NO_HOME not in str(error):
            raise
        print(SftError("~: no directory is known for it; set HOME, or write whole paths"), file=sys.stderr)
        sys.exit(2)
    except UnicodeEncodeError as error:  # of a file's name, under a locale that is not UTF-8
        print(SftError(f"{error.object!r:.200}: has no name in {error.encoding}; set LC_ALL=C.UTF-8"), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = error.filename or "file system"
        print(SftError(f"{where}: {error.strerror or error}; mend that, and try again"), file=sys.stderr)
        sys.exit(74)


if __name__ == "__main__":
    main()
