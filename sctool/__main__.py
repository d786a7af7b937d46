"""`python -m sctool` is the same as the `sctool` command."""

from sctool.cli import main

if __name__ == "__main__":
    main()
