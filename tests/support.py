"""The page docs/support.md, out of the contract table: which laws which kinds of caches meet.

`python tests/support.py` writes it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from contract import CASES, CHOSEN, LAWS, TABLE, Case
from jaxkv import Chunk, Cross, Dense, Float8, Full, Int4, Int8, LayerSpec, Pages, Recurrent, Window

PAGE = Path(__file__).parent.parent / "docs" / "support.md"


def _some(of: Callable[[LayerSpec], bool]) -> Callable[[Case], bool]:
    return lambda case: any(of(spec) for spec in case.specs)


def _stored(kind: type, small: bool = False) -> Callable[[Case], bool]:
    def keeps(spec: LayerSpec) -> bool:
        if isinstance(spec.reach, Recurrent):
            return False
        storages = spec.k_storage, spec.v_storage
        return any(isinstance(x, kind) and (x.dtype.itemsize < 2) == small for x in storages)

    return _some(keeps)


REACHES = {
    kind.__name__: _some(lambda spec, kind=kind: isinstance(spec.reach, kind))
    for kind in (Full, Window, Chunk, Cross, Recurrent)
}
STORAGES = {
    "Dense, 16 and 32 bits": _stored(Dense),
    "Dense, 8 and 4 bits": _stored(Dense, small=True),
    **{
        kind.__name__: _some(lambda spec, kind=kind: kind in (type(spec.k_storage), type(spec.v_storage)))
        for kind in (Int8, Int4, Float8)
    },
}
LAYOUTS = {
    "Rows": lambda case: not isinstance(case.layout, Pages),
    "Pages": lambda case: isinstance(case.layout, Pages),
    "stacked": lambda case: case.stacked,
}
OTHERS = {
    "shares": _some(lambda spec: spec.shares is not None),
    "v_in_k": _some(lambda spec: spec.v_in_k),
    'rotary_at="read"': _some(lambda spec: spec.rotary_at == "read"),
}
KINDS = REACHES | STORAGES | LAYOUTS | OTHERS
REFUSED = {  # the law itself checks the error
    ("remove_closes_the_gap", "Recurrent"): "error",
}


def cell(law: str, kind: str) -> str:
    """Returns what the table has of a law on caches of a kind: "yes", "error" where it is refused, or ""."""
    rows = TABLE if CASES[law] is CHOSEN else CASES[law]
    met = any(KINDS[kind](TABLE[name]) for name in rows)
    return REFUSED.get((law, kind), "yes") if met else ""


def _grid(corner: str, rows: dict[str, list[str]], columns: list[str]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def page() -> str:
    """Returns the text of the page."""
    grids = []
    for title, kinds in (("Reaches", REACHES), ("Storages", STORAGES), ("Layouts", LAYOUTS), ("Options", OTHERS)):
        columns = [f"`{kind}`" if "," not in kind and " " not in kind else kind for kind in kinds]
        rows = {law.replace("_", " "): [cell(law, kind) for kind in kinds] for law in LAWS}
        grids.append(f"## {title}\n\n{_grid('law', rows, columns)}\n")
    pairs = {}
    for kind in KINDS:
        both = [any(KINDS[kind](case) and KINDS[other](case) for case in TABLE.values()) for other in REACHES | LAYOUTS]
        pairs[kind] = ["yes" if there else "" for there in both]
    seen = _grid("together with", pairs, [f"`{kind}`" for kind in REACHES | LAYOUTS])
    counts = {kind: sum(KINDS[kind](case) for case in TABLE.values()) for kind in KINDS}
    assert all(counts.values()), counts
    return f"""# What works with what

Reach, storage and layout are independent choices, and every operation works for all of them. This page shows which
combinations the tests check. It is made from the table of caches in `tests/contract.py`, which has {len(TABLE)} rows.

Each law below runs on rows of the kinds where it says "yes". "error" means that the operation is refused, with the
cure. An empty cell means that no row of the table has this kind for the law, most often because the law is about
something else.

Random programs of all operations run on every row of the table too, and a NumPy oracle checks each step. `drops`, side
buffers and `select` have tests of their own.

{chr(10).join(grids)}
## Which kinds stand together in one row of the table

{seen}

Some combinations are errors when the cache is made, because they can't work:

- `LayerSpec(Recurrent(...))` with heads, sizes, a storage or a rotary: its state is float32, the reach has its sizes.
- `stacked=True` with layers that share, and `shares=` of a Cross layer, of a later layer, or of one that shares itself.
- `rotary=` for Cross layers; `v_in_k=True` with a rotary that would rotate the values: give `rotary_at="read"`.
- A storage that can't hold the vectors of a layer, such as `Int4(group=8)` for a head size of 12.
- A pool of pages that can't hold `max_block` tokens.

Others are errors when they are called: `remove` with an `end` where a layer has no rotary, or is recurrent; token trees
(`parents=`) in a cache with recurrent layers; `put(where=)` without `drops=True`.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
