"""The miniature's scenes: what is drawn is what the facts and the caption say."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "miniature"))
import scenes as s  # noqa: E402

N = 96


@pytest.fixture(scope="module")
def drawn() -> s.Scenes:
    return s.scenes(N, torch.Generator().manual_seed(5))


def read_caption(words: list[str]) -> dict:
    """A caption's facts, by its grammar."""
    objects, relation, where = [{}], None, {}
    background = words[words.index("on") + 1]
    rest = words[: words.index("on")]
    assert words[words.index("on") + 2 :] == []
    for i, word in enumerate(rest):
        here = objects[-1]
        if word == "and" or word in ("above", "below") or rest[i + 1 : i + 2] == ["of"]:
            relation = None if word == "and" else word if word in ("above", "below") else f"{word} of"
            objects.append({})
        elif word in s.SIZES:
            here["size"] = word
        elif word in s.TEXTURES:
            here["texture"] = word
        elif word in s.SHAPES:
            here["shape"] = word
        elif word in s.COLOURS:
            here["colour"] = word
        elif word != "of":
            where.setdefault(len(objects) - 1, []).append(word)
    return {"objects": objects, "relation": relation, "where": where, "background": background}


def test_captions_say_the_facts(drawn):
    f = drawn.facts
    for n in range(N):
        said = read_caption(s.caption_text(drawn.words[n]).split())
        assert len(said["objects"]) == f.count[n]
        assert said["background"] == s.BACKGROUNDS[f.background[n]]
        assert said["relation"] == (None, *s.RELATIONS)[f.relation[n]]
        for i, told in enumerate(said["objects"]):
            assert told["shape"] == s.SHAPES[f.shape[n, i]] and told["colour"] == tuple(s.COLOURS)[f.colour[n, i]]
            assert told["colour"] != said["background"]
            assert told.get("size", "medium") == tuple(s.SIZES)[f.size[n, i]]
            assert told.get("texture", "plain") == s.TEXTURES[f.texture[n, i]]
            row, column = divmod(int(f.cell[n, i]), 3)
            if said["relation"] is None:
                place = [w for w in (s.ROWS[row], s.COLUMNS[column]) if w]
                assert said["where"].get(i, ["centre"]) == (place or ["centre"])
        if said["relation"]:
            (row_a, column_a), (row_b, column_b) = (divmod(int(c), 3) for c in f.cell[n])
            true = {"left of": column_a < column_b, "right of": column_a > column_b, "above": row_a < row_b, "below": row_a > row_b}
            assert true[said["relation"]] and said["where"] == {}


def test_everything_occurs_and_nothing_touches():
    f = s.draw_facts(20_000, torch.Generator().manual_seed(0))
    two = f.count == 2
    for values, choices in ((f.shape, 16), (f.colour, 8), (f.texture, 4), (f.size, 3)):
        assert values.unique().tolist() == list(range(choices))
    for colour in range(8):  # every colour meets every background but its own
        met = {b for i in range(2) for b in f.background[f.colour[:, i] == colour].tolist()}
        assert met == set(range(11)) - {colour}
    assert f.cell[~two, 0].unique().tolist() == list(range(9))
    apart = torch.maximum((f.cell[:, 0] // 3 - f.cell[:, 1] // 3).abs(), (f.cell[:, 0] % 3 - f.cell[:, 1] % 3).abs())
    assert (apart[two] == 2).all()
    assert 0.5 < two.float().mean() < 0.7 and (f.relation[~two] == 0).all() and f.relation[two].unique().tolist() == [0, 1, 2, 3, 4]


def test_the_usual_words_are_sometimes_left_out():
    f = s.draw_facts(4000, torch.Generator().manual_seed(1))
    words = s.caption_words(f, torch.Generator().manual_seed(2))
    medium = (words == s.VOCABULARY.index("medium")).any(1)[(f.size == 1).all(1) & (f.count == 1)].float().mean()
    assert 0.4 < medium < 0.6
    lengths = (words > 0).sum(1)
    assert lengths.max() <= s.CAPTION
    assert all((row[:n] > 0).all() and (row[n:] == 0).all() for row, n in zip(words, lengths.tolist(), strict=True))


def grid(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y [side, side] over -1 to 1."""
    lines = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(lines, lines, indexing="ij")
    return x, y


@pytest.mark.parametrize("shape", s.SHAPES[:6])
def test_shapes_have_their_area(shape):
    """Covered area in squares of the radius, by geometry."""
    star = 5 * 0.42 * math.sin(math.pi / 5)
    areas = {"circle": math.pi * 0.95**2, "square": 1.64**2, "triangle": 3 * math.sqrt(3) / 4, "star": star,
             "ring": math.pi * (0.95**2 - 0.45**2), "cross": 2 * 1.9 * 0.6 - 0.6**2}  # fmt: skip
    x, y = grid(800)
    inside = s.shape_distance(torch.tensor([s.SHAPES.index(shape)]), x[None], y[None])[0] < 0
    assert float(inside.float().mean() * 4) == pytest.approx(areas[shape], rel=0.01)


@pytest.mark.parametrize(("digit", "lit"), list(enumerate((0x3F, 0x06, 0x5B, 0x4F, 0x66, 0x6D, 0x7D, 0x07, 0x7F, 0x6F))))
def test_digits_have_their_segments(digit, lit):
    """lit: the usual code of a seven-segment display, segment a in the lowest bit."""
    x, y = grid(200)
    bars = {  # left, right, top, bottom
        "a": (-0.52, 0.52, -0.97, -0.63),
        "b": (0.25, 0.59, -0.91, 0.09),
        "c": (0.25, 0.59, -0.09, 0.91),
        "d": (-0.52, 0.52, 0.63, 0.97),
        "e": (-0.59, -0.25, -0.09, 0.91),
        "f": (-0.59, -0.25, -0.91, 0.09),
        "g": (-0.52, 0.52, -0.17, 0.17),
    }
    wanted = torch.zeros(200, 200, dtype=torch.bool)
    for bit, (left, right, top, bottom) in enumerate(bars.values()):
        if lit >> bit & 1:
            wanted |= (x > left) & (x < right) & (y > top) & (y < bottom)
    inside = s.shape_distance(torch.tensor([s.SHAPES.index(str(digit))]), x[None], y[None])[0] < 0
    assert (inside ^ wanted).float().mean() < 0.002  # the bars' edges may fall between


def test_shapes_are_told_apart():
    inside = s.shape_distance(torch.arange(16), *(t.expand(16, -1, -1) for t in grid(64))) < 0
    differing = (inside[:, None] ^ inside[None]).float().mean((2, 3)) + torch.eye(16)
    assert differing.min() > 0.02


def test_objects_are_where_and_what_the_facts_say(drawn):
    pictures, f = drawn.pictures, drawn.facts
    assert pictures.shape == (N, 3, 128, 128) and pictures.dtype == torch.float32 and pictures.min() >= 0 and pictures.max() <= 1
    tones = torch.tensor(list(s.COLOURS.values()))
    for n in range(N):
        for i in range(int(f.count[n])):
            row, column = divmod(int(f.cell[n, i]), 3)
            y, x = int(s.CENTRES[row]), int(s.CENTRES[column])
            around = pictures[n, :, y - 30 : y + 30, x - 30 : x + 30].flatten(1)
            hue, tone = around / around.amax(0), tones[f.colour[n, i]][:, None]  # of what is shaded too
            near = ((hue - tone / tone.amax()).abs().amax(0) < 0.06) & (around.amax(0) > 0.4 * tone.amax())
            assert near.sum() >= (2 if s.TEXTURES[f.texture[n, i]] != "plain" else 40), s.caption_text(drawn.words[n])
        edge = torch.cat((pictures[n, :, :2].flatten(1), pictures[n, :, -2:].flatten(1)), 1)
        name = s.BACKGROUNDS[f.background[n]]
        ground = torch.tensor(s.NEUTRALS.get(name) or [0.4 * c + 0.03 for c in s.COLOURS[name]])
        assert (edge - ground[:, None]).abs().max() < 0.16, "an object reaches the edge, or the background is another one"


def test_the_first_object_in_reading_order(drawn):
    shape, colour, cell = drawn.facts.first()
    for n in range(N):
        there = range(int(drawn.facts.count[n]))
        which = min(there, key=lambda i, n=n: int(drawn.facts.cell[n, i]))
        wanted = (drawn.facts.shape[n, which], drawn.facts.colour[n, which], drawn.facts.cell[n, which])
        assert (shape[n], colour[n], cell[n]) == wanted


def test_the_same_seed_draws_the_same():
    a, b, c = (s.scenes(3, torch.Generator().manual_seed(seed)) for seed in (9, 9, 10))
    assert torch.equal(a.pictures, b.pictures) and torch.equal(a.words, b.words)
    assert not torch.equal(a.pictures, c.pictures)
