"""Read every byte of quantized models and hold it against the digests that were written with them.

    python scripts/verify.py outputs/tiny_video/w4a8_ts_smooth      # a run's folder, or an artifact (<run>/quantized)

Loading checks a tensor when it is first read; this checks all of them at once, after a copy for instance.
"""

import argparse
import sys
from pathlib import Path

from viditq.errors import UserError
from viditq.loading import artifact_folder
from viditq.quant.artifact import verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    for given in parser.parse_args().folders:
        folder = artifact_folder(given)
        try:
            print(f"{folder}: {verify(folder) / 1e6:,.2f} MB, all as written")
        except UserError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
