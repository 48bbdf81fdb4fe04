"""`python -m millhand`."""

from millhand.cli import main

if __name__ == "__main__":
    main()
