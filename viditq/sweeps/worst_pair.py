"""The pair of samples that a row of a leaderboard shows: the worst of its first run, small."""

from collections.abc import Iterable
from pathlib import Path

from viditq.data.samples import load_sample
from viditq.errors import UserError
from viditq.report.board_page import WorstPair
from viditq.report.leaderboard import Board
from viditq.report.media import Encoding, make_sheet
from viditq.report.ranking import rank_pairs
from viditq.report.row import Row

SMALL = 128  # pixels of a side up to which a frame is kept as it is
ENCODINGS = {True: Encoding(SMALL), False: Encoding(192, 80)}


def worst_pairs(boards: Iterable[Board]) -> dict[str, WorstPair]:
    """Folder of a row's first run -> its worst pair; without those whose samples are gone or rank by nothing."""
    rows = {row.folder: row for board in boards for row in board.rows}
    return {folder: pair for folder, row in rows.items() if (pair := worst_pair(row)) is not None}


def worst_pair(row: Row) -> WorstPair | None:
    """Of a clip the frame that differs most; None where a sample is gone or no metric ranks pairs."""
    per_prompt, labels = row.per_prompt[0], row.metrics[0]["labels"]
    try:
        ranking = rank_pairs(per_prompt, labels)
    except UserError:
        return None
    index = ranking.indices[0]
    files = [sample_of(Path(folder), index) for folder in (per_prompt["reference"], f"{row.folder}/samples")]
    if None in files:
        return None
    reference_FCHW, sample_FCHW = (load_sample(file) for file in files if file)
    differences_F = (reference_FCHW.float() - sample_FCHW.float()).square().flatten(1).sum(1)
    frame = int(differences_F.argmax())
    encoding = ENCODINGS[max(reference_FCHW.shape[-2:]) <= SMALL]
    sheets = [make_sheet(clip[frame : frame + 1], encoding) for clip in (reference_FCHW, sample_FCHW)]
    label = labels[ranking.metric]
    score = f"{label['label']} {ranking.scores[index]:.3g} {label['unit']}".strip()
    return WorstPair(sheets[0].address, sheets[1].address, str(per_prompt["prompts"][index]), score)


def sample_of(folder: Path, index: int) -> Path | None:
    """The file with the picture or frames of a prompt's sample, whatever its type."""
    return next(
        (path for path in sorted(folder.glob(f"{index:06d}.*")) if path.suffix in (".png", ".safetensors")), None
    )
