"""``python -m specdec``, which is also what ``accelerate launch -m specdec`` starts."""

from specdec.cli import main

if __name__ == "__main__":
    main()
