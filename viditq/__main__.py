"""`python -m viditq` is `viditq`."""

from viditq.program import command

if __name__ == "__main__":
    command()
