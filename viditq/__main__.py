"""`python -m viditq` is `viditq`."""

import sys

from viditq.program import main

if __name__ == "__main__":
    sys.exit(main())
