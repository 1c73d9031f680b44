"""`python -m diffharness`, and where the installed command begins.

Ctrl-C while the modules are still being imported ends as it does later, without a traceback.
"""

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit."""
    try:
        from diffharness.allocator import keep_freed_memory

        keep_freed_memory()  # before any library starts its threads
        from diffharness.cli.main import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
