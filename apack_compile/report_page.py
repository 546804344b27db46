"""A report as HTML that needs no other file: no scripts, no fonts or pictures from elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from apack_compile.checks import size

# The colours follow the reader's system. So does the background, since a notebook's theme may be another one.
STYLE = """
.apack { color-scheme: light dark; background: Canvas; overflow-x: auto; padding: .5em 1em; }
.apack { --ink: #1f2430; --muted: #68707f; --line: #e3e6ec; --dense: #aab4c5; --packed: #2f6fde; --bases: #a9c4f5;
  color: var(--ink); font: 14px/1.5 system-ui, sans-serif; max-width: 60rem; }
@media (prefers-color-scheme: dark) { .apack { --ink: #e8eaf0; --muted: #9aa3b5; --line: #363c4a; --dense: #6b7588;
  --packed: #6d9cf0; --bases: #40609c; } }
.apack h1 { font-size: 1.5em; margin: 0 0 .2em; } .apack h2 { font-size: 1.1em; margin: 1.4em 0 .4em; }
.apack p { margin: .2em 0; } .apack .muted { color: var(--muted); }
.apack table { border-collapse: collapse; width: 100%; background: none; }
.apack th, .apack td { text-align: left; padding: .15em .6em .15em 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
.apack tr { background: none !important; }
.apack .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.apack .track { position: relative; min-width: min(8rem, 18vw); height: .8em; background: none; }
.apack .bar { position: absolute; top: 0; left: 0; height: 100%; border-radius: 2px; }
.apack .dense { background: var(--dense); } .apack .packed { background: var(--packed); } .apack .bases { background: var(--bases); }
.apack li { margin: .3em 0; }
"""
PAGE_STYLE = ":root { color-scheme: light dark; } body { margin: 1.5rem auto; max-width: 62rem; }"


def page_of(report: Mapping[str, Any]) -> str:
    """A whole page of a report's plain values."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape('apack-compile: ' + report['setting'])}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n"
        f"<body>\n{fragment_of(report)}</body>\n</html>\n"
    )


def fragment_of(report: Mapping[str, Any]) -> str:
    """The part of a page that a notebook shows."""
    parts = [
        f"<h1>{escape(report['setting'])}</h1>",
        *_cache(report["bytes"], report["room"]),
        *_layers(report),
        *_notes(report["notes"]),
        *_settings(report),
    ]
    return f'<style>{STYLE}</style>\n<div class="apack">\n' + "\n".join(parts) + "\n</div>\n"


def _cache(held: Mapping[str, Any] | None, room: Mapping[str, Any] | None) -> Iterable[str]:
    """The bytes of the last cache."""
    if held is None:
        yield '<p class="muted">No cache was packed so far.</p>'
        return
    dense, packed, bases = (held[name] for name in ("dense_bytes", "sequence_bytes", "model_bytes"))
    yield (
        f"<p>The last cache holds {held['tokens']:,} tokens in {size(packed)} instead of {size(dense)}: "
        f"<b>{held['ratio']:.2f} times smaller</b>.</p>"
    )
    yield "<h2>Bytes of the last cache</h2>"
    longest = max(dense, packed, bases, 1)
    yield _table(
        ("", "", _number("bytes")),
        [
            ("dense, 16 bits", _bars(("dense", dense / longest)), _number(f"{dense:,}")),
            ("packed", _bars(("packed", packed / longest)), _number(f"{packed:,}")),
            ("bases, once for all requests", _bars(("bases", bases / longest)), _number(f"{bases:,}")),
        ],
    )
    parts = [(name, count) for name, count in held["parts"].items() if count]
    yield f"<p class='muted'>Packed: {escape(', '.join(f'{_percent(count / packed)} {name}' for name, count in parts))}.</p>"
    if room is not None:
        yield (
            f"<p>Beside the weights, {size(room['memory'])} of {escape(room['device'])} hold about {room['packed']:,} caches like it, "
            f"and {room['dense']:,} dense ones. What a forward pass needs is not counted.</p>"
        )


def _layers(report: Mapping[str, Any]) -> Iterable[str]:
    """One row a layer."""
    found = {layer["layer"]: layer for layer in report["layer_bytes"]}
    longest = max((layer["dense"] for layer in found.values()), default=1)
    yield "<h2>Layers</h2>"
    if found:
        yield (
            f'<p class="muted">Bytes of a token, keys and values, planned for {escape(report["planned_for"])}: dense behind, packed in '
            "front. Loss: the share of variance that coding is expected to lose on the calibration's tokens; what that does to "
            "predictions (KL) is known only where it is measured.</p>"
        )
    rows = []
    for line in report["layers"]:
        layer = found.get(line["layer"])
        bars = said = lost = ""
        if layer is not None:
            bars = _bars(("dense", layer["dense"] / longest), ("packed", layer["packed"] / longest))
            said = f"{layer['packed']:,.0f} of {layer['dense']:,}"
            lost = "" if layer["lost"] is None else f"{layer['lost']:.1%}"
        what = f"{line['kind']}, {line['status']}" + (f": {line['reason']}" if line["reason"] else "")
        rows.append((_number(str(line["layer"])), bars, _number(said), _number(lost), escape(what)))
    yield _table((_number("layer"), "bytes of a token", "", _number("loss"), "status"), rows)


def _notes(notes: Sequence[str]) -> Iterable[str]:
    yield "<h2>Notes</h2>"
    if notes:
        yield "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"
    else:
        yield '<p class="muted">None: everything was done as asked.</p>'


def _settings(report: Mapping[str, Any]) -> Iterable[str]:
    """How it was done."""
    rows = [
        ("decode steps", f"{report['compile']} ({report['compile_reason']})"),
        ("bases calibrated on", report["calibrated_on"]),
        ("weighed by", report["weighed_by"]),
        ("packed keys", report["keys"]),
        ("head groups", report["head_groups"]),
        ("weights", size(report["weight_bytes"])),
        *report["operations"].items(),
    ]
    yield "<h2>How</h2>"
    yield _table(("", ""), [(escape(name), escape(said)) for name, said in rows if said])


def _bars(*bars: tuple[str, float]) -> str:
    """Bars of one row, longest first: their kind, and their share of the longest of all rows."""
    drawn = (f'<div class="bar {kind}" style="width: {100 * min(share, 1):.2f}%"></div>' for kind, share in bars)
    return f'<div class="track">{"".join(drawn)}</div>'


def _number(said: str) -> tuple[str, str]:
    """A cell whose numbers stand below one another."""
    return "number", said


def _percent(share: float) -> str:
    """A share that is not nothing."""
    return f"{share:.0%}" if share >= 0.005 else "under 1%"


def _table(heads: Sequence[str | tuple[str, str]], rows: Iterable[Sequence[str | tuple[str, str]]]) -> str:
    """A table; cells are HTML, with a class where they are a pair."""
    head = "".join(_cell(name, "th") for name in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(cell: str | tuple[str, str], tag: str = "td") -> str:
    return f"<{tag}>{cell}</{tag}>" if isinstance(cell, str) else f'<{tag} class="{cell[0]}">{cell[1]}</{tag}>'
