"""Loss against seconds as a small SVG picture."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 320, 60, 16, 180, 44
COLOURS = {"ours": "#0b6e4f", "nanogcg_loop": "#c1440e", "nanogcg_package": "#5b5b8c"}
NAMES = {
    "ours": "durometer",
    "nanogcg_loop": "nanoGCG's loop",
    "nanogcg_package": "nanoGCG's package",
}


def picture(losses: Mapping[str, Sequence[tuple[float, float]]], initial: float) -> str:
    """Return the curves, each begun at second 0 with the first suffix's loss."""
    curves = {name: [(0.0, initial), *points] for name, points in losses.items()}
    seconds = max(x for points in curves.values() for x, _ in points)
    low = min(y for points in curves.values() for _, y in points)

    def at(x: float, y: float) -> tuple[float, float]:
        right, down = x / seconds, (initial - y) / (initial - low)
        return LEFT + right * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    left, bottom = at(0, low)
    body = [
        f'<path d="M{left} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>',
        _text(left, bottom + 18, "0", "middle"),
        _text(WIDTH - RIGHT, bottom + 18, f"{seconds:.0f}", "middle"),
        _text((left + WIDTH - RIGHT) / 2, bottom + 34, "seconds", "middle"),
        _text(left - 8, TOP + 4, f"{initial:.2f}", "end"),
        _text(left - 8, bottom + 4, f"{low:.2f}", "end"),
        _text(left - 8, (TOP + bottom) / 2, "loss", "end"),
    ]
    for place, (name, points) in enumerate(curves.items()):
        dots = [at(*point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        colour = COLOURS[name]
        body.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots]
        row = TOP + 20 + 22 * place
        edge = WIDTH - RIGHT + 20
        body.append(f'<circle cx="{edge}" cy="{row - 4}" r="4" fill="{colour}"/>')
        body.append(_text(edge + 10, row, NAMES[name], "start"))
    title = "Loss against seconds of each search"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title}" font-family="sans-serif" font-size="13">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'
