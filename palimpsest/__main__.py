"""`python -m palimpsest STAGE …`: the command, also under `accelerate launch -m palimpsest STAGE …`."""

from palimpsest.command import main

if __name__ == "__main__":
    main()
