"""report.html: one self-contained file that shows what quantization did, and what it cost.

Nothing in it is fetched from anywhere: pictures are data: addresses, style and script are inlined and named by their
hashes in a Content-Security-Policy that allows nothing else.
"""

from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from viditq.files import atomic
from viditq.report import wording
from viditq.report.cards import clip_data, make_card, sort_keys
from viditq.report.content import PageContent
from viditq.report.diagnosis import diagnose
from viditq.report.incoherence import incoherence_view
from viditq.report.media import MAX_MEDIA_BYTES, encode_pairs
from viditq.report.plan_view import segment_words
from viditq.report.search_view import SearchView, search_view
from viditq.report.sound import encode_sounds
from viditq.report.speed import emulated, speed_line, speed_view
from viditq.report.stage_seconds import stage_seconds
from viditq.report.text_encoders import text_encoder_view
from viditq.report.treatments_view import TreatmentsView, treatments_view
from viditq.report.verdicts import headline, judge_all
from viditq.report.wording import digits_for, finite, plain

TEMPLATES = Path(__file__).parent / "templates"
STYLES, SCRIPTS = ("page.css", "pairs.css", "charts.css"), ("clips.js", "pairs.js", "charts.js")
MAX_PIXELATED = 128  # frames up to this side are shown with their pixels as squares


def write_page(content: PageContent, path: Path, max_media_bytes: int = MAX_MEDIA_BYTES) -> Path:
    """Write the page, whole or not at all; large clips are reduced until they take `max_media_bytes` at most."""
    text = render(content, max_media_bytes)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(content: PageContent, max_media_bytes: int = MAX_MEDIA_BYTES) -> str:
    """The page as text."""
    sounds = [pair.sounds for pair in content.pairs if pair.sounds is not None]
    players = encode_sounds(sounds) if sounds else None
    media = encode_pairs(
        [pair.clips for pair in content.pairs], max_media_bytes - (players.num_bytes if players else 0)
    )
    groups = judge_all(content.metrics)
    style, script = joined(STYLES), joined(SCRIPTS)
    cards = [make_card(content, pair, sheets) for pair, sheets in zip(content.pairs, media.sheets, strict=True)]
    num_frames = max((sheet.num_frames for pair in media.sheets for sheet in pair), default=1)
    return template("page.html").render(
        content=content,
        metrics=content.metrics,
        headline=headline(groups),
        groups=groups,
        media=media,
        players=players,
        cards=cards,
        pixelated=all(not s.reduced and max(s.width, s.height) <= MAX_PIXELATED for s, _ in media.sheets),
        num_prompts=content.metrics.get("prompts") or len(content.per_prompt["prompts"]),
        num_frames=num_frames,
        sort_keys=sort_keys(content),
        clip_data=clip_data(content, media.sheets),
        diagnosis=diagnose(content.errors, content.segments) if content.errors else None,
        incoherence=incoherence_view(content.incoherence) if content.incoherence else None,
        speed=speed_view(content.speed) if content.speed else None,
        emulation=emulated(content.metrics.get("backend")),
        speed_line=speed_line(content.metrics.get("backend"), content.speed),
        text_encoders=text_encoder_view(content.metrics),
        search=_search_view(content),
        treatments=_treatments_view(content),
        segment_words=segment_words(content.segments),
        stage_seconds=stage_seconds(content.metrics.get("seconds", {}), content.conditions),
        prompt_table=_prompt_table(content),
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
    )


def _treatments_view(content: PageContent) -> TreatmentsView | None:
    if content.treatments is None or content.treatments_picture is None:
        return None
    return treatments_view(content.treatments, content.treatments_picture)


def _search_view(content: PageContent) -> SearchView | None:
    if content.search is None or content.heat_map is None:
        return None
    return search_view(content.search, content.heat_map, content.budget_curve)


@cache
def template(name: str) -> Template:
    """One of the pages, compiled once (0.1 s); everything that it is given is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("percent", "three_digits", "num_bytes", "seconds")
    environment.filters.update({name: getattr(wording, name) for name in names})
    return environment.get_template(name)


def content_policy(style: str, script: str) -> str:
    """What a page may load: its own style and script, named by their hashes, and pictures and sound that it holds."""
    return (
        f"default-src 'none'; img-src data:; media-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )


def joined(names: Sequence[str]) -> str:
    """Our own files, which hold no end tag; surrounded by the line breaks that the template leaves as they are."""
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def _digest(text: str) -> str:
    """The source expression of an inlined element."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _prompt_table(content: PageContent) -> tuple[list[str], list[tuple[int, str, list[str]]]]:
    """(column labels, rows of index, prompt and words) for all prompts, in their order."""
    columns = {**content.per_prompt["metrics"]}
    labels = []
    for name in columns:
        base = name.removesuffix("_float")
        is_float = base != name and base in columns
        labels.append(f"{content.label(base)}, float" if is_float else content.label(name))
    rows = []
    for i, prompt in enumerate(content.per_prompt["prompts"]):
        values = [finite(values[i]) for values in columns.values()]
        rows.append((i, prompt, [plain(value, digits_for(value)) for value in values]))
    return labels, rows
