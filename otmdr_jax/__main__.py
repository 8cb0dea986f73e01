"""`python -m otmdr_jax` is `otmdr`."""

from otmdr_jax.experiments.cli import main

if __name__ == "__main__":
    main()
