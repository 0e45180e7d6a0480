"""The old name of `python -m judging.evaluate`, so that commands of before run."""

from judging.evaluate import main

if __name__ == "__main__":
    main()
