"""`python -m diffharness`."""

from diffharness.cli.main import main

if __name__ == "__main__":
    main()
