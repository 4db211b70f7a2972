"""The walk of kind hopper: which tiles, and which steps of k, a program does; written in Gluon."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def place(tile, A, B, A_TILE: gl.constexpr, B_TILE: gl.constexpr, GROUP: gl.constexpr):
    """Tile number -> first row of the high side, first row of the wide side, GROUP high tiles together."""
    a_tiles = gl.cdiv(A, A_TILE)
    width = GROUP * gl.cdiv(B, B_TILE)
    first = tile // width * GROUP
    size = gl.minimum(a_tiles - first, GROUP)
    return (first + tile % width % size) * A_TILE, tile % width // size * B_TILE


@gluon.jit
def abreast_of(p):
    """How many programs walk the same weight rows at once, a tile of tokens each."""
    if p.STREAM == 2:
        tokens = gl.cdiv(p.B, p.B_TILE + p.MORE) if p.SWAP else gl.cdiv(p.A, p.ROWS * p.GROUPS)
    else:
        tokens: gl.constexpr = 1
    return tokens


@gluon.jit
def first_rows(p, unit, parts):
    """Unit -> first row of the high side and of the wide side."""
    if p.STREAM == 2:
        tokens = unit % abreast_of(p)
        weight = unit // abreast_of(p) // parts
        a0 = (weight if p.SWAP else tokens) * (p.ROWS * p.GROUPS)
        b0 = (tokens if p.SWAP else weight) * (p.B_TILE + p.MORE)
    else:
        a0, b0 = place(unit // parts, p.A, p.B, p.ROWS * p.GROUPS, p.B_TILE + p.MORE, p.GROUP)
    return a0, b0


@gluon.jit
def segment_of(p, unit, parts):
    """Unit -> which segment it is of."""
    return (unit // abreast_of(p) if p.STREAM == 2 else unit) % parts


@gluon.jit
def jobs(units, abreast, STREAM: gl.constexpr):
    """How many jobs this program has, some of them perhaps empty."""
    if STREAM:
        jobs = gl.maximum(units // abreast // (gl.num_programs(0) // abreast) - 1, 0) + 4
    else:
        jobs = gl.cdiv(units - gl.program_id(0), gl.num_programs(0))
    return jobs


@gluon.jit
def job(number, units, steps, abreast, STREAM: gl.constexpr):
    """Job number -> (unit, first step, end) of this program; a unit is one chain of a tile, `steps` long.

    With STREAM the last one or two units a program are shared out evenly, cut where a share ends. A program begins
    with the leading steps of the unit that its share ends in, and ends with the closing steps of the unit that its
    share begins in: whoever has those waits for nothing, because the leading ones were made first. With STREAM 2,
    `abreast` programs have the same share of the weight's rows and of k, each for a tile of tokens of its own: they
    read the weight together, so that it comes from memory once.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    if STREAM == 2:
        tokens = program % abreast
        program = program // abreast
        programs = programs // abreast
        units = units // abreast
    if STREAM:
        waves = gl.maximum(units // programs - 1, 0)
        rest = units - waves * programs
        begin = program * rest * steps // programs
        end = (program + 1) * rest * steps // programs
        if number == 0:  # leading steps, which the next program takes over
            unit = waves * programs + end // steps
            first = 0
            last = end % steps
        elif number <= waves:  # whole units
            unit = program + (number - 1) * programs
            first = 0
            last = steps
        elif number <= waves + 2:  # the whole units within our share: none, one, or two where it ends with a unit
            whole = gl.cdiv(begin, steps) + number - waves - 1
            unit = waves * programs + whole
            first = 0
            last = gl.where((whole + 1) * steps <= end, steps, 0)
        else:  # closing steps, taken over
            unit = waves * programs + begin // steps
            first = begin % steps
            last = gl.where(first > 0, steps, 0)
    else:
        unit = program + number * programs
        first = 0
        last = steps
    if STREAM == 2:
        unit = unit * abreast + tokens
    return unit, first, last
