"""The first thread of a kernel, read from its PTX and run with names for numbers: which sums it makes of which chains.

Whole numbers and branches are worked out, so a loop runs as often as on a GPU. A tensor core's product, or a fused
multiply-add, continues a chain: Chain(first, length), where `first` counts all products of the thread before it. A
float32 addition is the set of what it adds, since a sum of two has no order. A load from global memory is
Load(address); what is not followed is None.
"""
import re
from typing import NamedTuple

CONSTANT = re.compile(r"-?\d+|0f[0-9A-Fa-f]{8}|0x[0-9A-Fa-f]+")


class Chain(NamedTuple):
    """`length` products one after the other, from zero."""

    first: int
    length: int


class Load(NamedTuple):
    """What lies at an address of global memory."""

    address: int


class Thread:
    """Runs at once. `numbers` are the kernel's whole numbers in its order, a pointer is i << 40 for i = 1, 2, ...

    rounded   every number that was rounded to 16 bits or, unrounded, stored in global memory, in order
    products  how many products there were
    """

    def __init__(self, ptx: str, numbers: list[int]):
        self.registers: dict = {"%tid.x": 0, "%ctaid.x": 0, "%nctaid.x": 1, "%laneid": 0}
        self.shared: dict = {}
        self.rounded: list = []
        self.products = 0
        self.parameters = _parameters(ptx, numbers)
        self._run(*_code(ptx))

    def _run(self, code, labels):
        at, steps = 0, 0
        while at < len(code):
            steps += 1
            assert steps < 2_000_000, "a loop without an end"
            guard, name, arguments = code[at]
            at += 1
            passes = guard is None or self._value(guard.lstrip("!"))
            if guard and guard.startswith("!") and passes is not None:
                passes = not passes
            if name.startswith("bra"):
                assert passes is not None, f"a branch on what is not known: {guard}"
                at = labels[arguments[0]] if passes else at
            elif name == "ret":
                return
            elif passes or passes is None and not name.startswith(("st.", "cvt.rn")):
                self._step(name, arguments)

    def _value(self, text):
        if CONSTANT.fullmatch(text):
            return 0 if text == "0f00000000" else None if text.startswith("0f") else int(text, 0)
        if text.startswith("{"):
            return [self._value(t) for t in _names(text)]
        return 0 if text.startswith("global_smem") else self.registers.get(text)

    def _address(self, text):
        base, _, offset = text.strip("[] ").partition("+")
        start = self._value(base.strip())
        return None if start is None else start + int(offset or 0)

    def _set(self, target, value):
        names = _names(target)
        fits = isinstance(value, list) and len(value) == len(names)
        self.registers.update(zip(names, value if fits else [None if isinstance(value, list) else value] * len(names),
                                  strict=True))

    def _step(self, name, arguments):
        kind = name.split(".")[0]
        if name.startswith("ld.param"):
            self._set(arguments[0], self.parameters.get(arguments[1].strip("[]")))
        elif name.startswith(("mma.sync", "wgmma.mma_async")):
            self._multiply(name, arguments)
        elif name == "fma.rn.f32":
            self._set(arguments[0], self._longer(self._value(arguments[3])))
        elif name == "add.rn.f32":
            self._set(arguments[0], _sum(*map(self._value, arguments[1:])))
        elif name.startswith(("ld.shared", "ld.global", "st.shared", "st.global")):
            self._memory(name, arguments)
        elif re.match(r"cvt\.rn\.(bf16|f16)(x2)?\.f32", name):
            self.rounded += map(self._value, arguments[1:])
            self._set(arguments[0], None)
        elif kind == "stmatrix":
            self.shared.clear()
        elif kind == "atom":
            self._set(arguments[0], 7)  # the last of eight that count
        elif kind == "shfl":
            self._set(arguments[0].split("|")[0], self._value(arguments[1]))
        elif kind == "mbarrier" and "try_wait" in name:
            self._set(arguments[0], True)
        elif kind in INTEGERS:
            given = [self._value(a) for a in arguments[1:]]
            self._set(arguments[0], None if any(v is None or isinstance(v, (tuple, frozenset, list)) for v in given)
                      and kind not in ("mov", "selp") else INTEGERS[kind](name, *given))
        elif arguments and arguments[0].startswith(("%", "{")):
            self._set(arguments[0], None)

    def _longer(self, chain):
        """`chain`, None among them, and one product more."""
        first, self.products = self.products, self.products + 1
        if chain == 0:
            return Chain(first, 1)
        return Chain(chain.first, chain.length + 1) if isinstance(chain, Chain) else ("no chain", chain)

    def _multiply(self, name, arguments):
        kept = self._value(arguments[-1] if name.startswith("mma") else arguments[0])
        if name.startswith("wgmma"):
            fresh = self._value(arguments[3])
            assert fresh is not None, "an accumulator that is perhaps not read"
            kept = kept if fresh else [0] * len(kept)
        made = {chain: self._longer(chain) for chain in dict.fromkeys(kept)}
        self._set(arguments[0], [made[chain] for chain in kept])

    def _memory(self, name, arguments):
        loads = name.startswith("ld")
        register, place = arguments if loads else arguments[::-1]
        names, address = _names(register), self._address(place)
        at = [None if address is None else address + 4 * i for i in range(len(names))]
        if "global" in name and loads:
            self._set(register, [None if a is None else Load(a) for a in at])
        elif loads:
            self._set(register, [self.shared.get(a) for a in at])
        elif "shared" in name and "32" in name and address is not None:
            self.shared.update(zip(at, map(self._value, names), strict=True))
        elif "shared" in name:
            self.shared.clear()
        elif "32" in name:
            self.rounded += [v for v in map(self._value, names) if isinstance(v, (Chain, frozenset, Load))]


def _sum(a, b):
    """a + b; +0 adds nothing, since every sum here is added to +0 in the end."""
    return a if b == 0 else b if a == 0 else frozenset((a, b))


def _names(text):
    return [t.strip() for t in text.strip("{} ").split(",")]


def _parameters(ptx, numbers):
    """The entry's parameters by name: pointers, then whole numbers; tensor descriptors and what they hold are None."""
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.S)[1].split(",")
    pointers = [p.split()[-1] for p in entry if ".ptr" in p]
    after = entry[max(i for i, p in enumerate(entry) if ".u32" in p) - len(numbers) + 1:]
    whole = [p.split()[-1] for p in after if ".u32" in p]
    assert len(whole) == len(numbers), entry
    return {**{p: i << 40 for i, p in enumerate(pointers, 1)}, **dict(zip(whole, numbers, strict=True))}


def _code(ptx):
    """([(guard or None, instruction, its arguments)], label -> index)."""
    code, labels = [], {}
    for line in ptx[re.search(r"^\{", ptx, re.M).end():].splitlines():
        line = line.strip()
        if label := re.fullmatch(r"([$\w]+):", line):
            labels[label[1]] = len(code)
        elif found := re.fullmatch(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*?);", line):
            code.append((found[1], found[2], re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[3])))
    return code, labels


def _bits(name):
    return 64 if re.search(r"[busf]64$", name) else 32


def _signed(value, bits):
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def _as(name, value):
    """A register's bits as the number that an instruction of this type reads."""
    bits = _bits(name)
    return _signed(value, bits) if re.search(r"\.s\d+$", name) else value & (1 << bits) - 1


def _divide(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _plain(function):
    def work(name, *given):
        return function(*(int(_as(name, v)) for v in given)) & (1 << (64 if ".wide" in name else _bits(name))) - 1
    return work


def _compare(name, a, b, *also):
    how = name.split(".")[1]
    a, b = _as(name, a), _as(name, b)
    return {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "eq": a == b, "ne": a != b}[how]


def _logic(function):
    def work(name, *given):
        if name.endswith("pred"):
            return bool(function(*map(bool, given)))
        return function(*given) & (1 << _bits(name)) - 1
    return work


def _multiplied(name, a, b, c=0):
    a, b = _as(name, a), _as(name, b)
    product = a * b >> 32 if ".hi" in name else a * b
    return product + c & (1 << (64 if ".wide" in name else _bits(name))) - 1


def _field(name, value, start, length):
    """bfe: bits of a number, with their sign."""
    found = _as(name.replace(".s", ".u"), value) >> start & (1 << length) - 1
    return _signed(found, length) & (1 << _bits(name)) - 1 if ".s" in name and length else found


INTEGERS = {
    "mov": lambda name, value: bool(value) if name.endswith("pred") else value,
    "cvt": lambda name, value: _as("x." + name.split(".")[-1], value) & (1 << _bits(name.rsplit(".", 1)[0])) - 1,
    "cvta": lambda name, value: value,
    "add": _plain(lambda a, b: a + b), "sub": _plain(lambda a, b: a - b), "min": _plain(min), "max": _plain(max),
    "div": _plain(_divide), "rem": _plain(lambda a, b: a - b * _divide(a, b)),
    "mul": _multiplied, "mad": _multiplied, "neg": _plain(lambda a: -a),
    "shl": _plain(lambda a, b: a << b), "shr": _plain(lambda a, b: a >> b), "bfe": _field,
    "and": _logic(lambda a, b: a & b), "or": _logic(lambda a, b: a | b), "xor": _logic(lambda a, b: a ^ b),
    "not": _logic(lambda a: (not a) if isinstance(a, bool) else ~a),
    "setp": _compare,
    "selp": lambda name, a, b, which: None if which is None else a if which else b,
}
