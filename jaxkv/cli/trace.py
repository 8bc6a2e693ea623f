"""`--trace FILE` and `--watch`: the cache of a run, step by step, in one HTML page or in the terminal.

Which position lies in which slot is decided by `Cache.begin` alone. So a cache of the same layers, of one number each,
that is fed the same positions, is at each step what the run's own cache is, which was donated to the compiled loop.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.look import show
from jaxkv.cache.spec import EMPTY, Chunk, Cross
from jaxkv.generate.reading import blocks, last_positions
from jaxkv.picture import Picture

_MOST = 1024  # squares of a group and row; more slots share them


class Trace:
    """What lies where after each step of a run.

    Args:
      cache: of the run, before it begins.
      prompts: token numbers of each row, or None.
      texts: the tokens of each row's prompt, as text.
    """

    def __init__(self, cache: Any, prompts: Sequence[Sequence[int] | None], texts: Sequence[Sequence[str]]) -> None:
        specs = [
            dataclasses.replace(spec, num_kv_heads=1, head_dim=1, value_dim=1, rotary=None) for spec in cache.specs
        ]
        specs = [spec for spec in specs if not isinstance(spec.reach, Cross)]
        options = {"max_block": cache.max_block, "slack": cache.slack, "layout": cache.layout}
        self._cache = Cache.init(specs, cache.num_rows, cache.capacity, **options)
        self._begin = jax.jit(lambda cache, positions: cache.begin(positions)[0])
        self._held = [np.asarray(group.held) for group in self._cache.groups]
        self._steps: list[dict[str, Any]] = []
        self._texts = [list(text) for text in texts]
        given = [np.asarray([] if prompt is None else prompt, np.int32) for prompt in prompts]
        last = last_positions(given)
        for _, positions, _ in blocks(given, np.zeros_like(last), last, cache.max_block):
            self._take(positions, "prefill")
        self._next = np.where([prompt.size > 0 for prompt in given], last, EMPTY).astype(np.int32)

    def step(self, new: Sequence[str | None]) -> None:
        """Notes one step: the text of each row's new token, None for rows that got none."""
        live = np.array([text is not None for text in new])
        positions = np.where(live, self._next, EMPTY).astype(np.int32)
        self._take(positions[:, None], "decode")
        self._next = np.where(live, self._next + 1, EMPTY).astype(np.int32)
        for texts, text in zip(self._texts, new, strict=True):
            if text is not None:
                texts.append(text)

    @property
    def picture(self) -> Picture:
        """The cache as it is now."""
        return show(self._cache)

    def _take(self, positions: np.ndarray, kind: str) -> None:
        self._cache = self._begin(self._cache, positions)
        written = []
        for number, group in enumerate(self._cache.groups):
            held = np.asarray(group.held)
            rows, slots = np.nonzero(held != self._held[number])
            written += [[number, *map(int, where), int(held[where])] for where in zip(rows, slots, strict=True)]
            self._held[number] = held
        queries = [int(max(row)) for row in positions]
        self._steps.append({"kind": kind, "writes": written, "queries": queries})

    def page(self, title: str) -> str:
        """Returns one self-contained HTML page with a slider over the steps."""
        groups = []
        for group in self._cache.groups:
            reach = group.reach
            groups.append(
                {
                    "name": str(reach),
                    "slots": group.num_slots,
                    "each": -(-group.num_slots // _MOST),
                    "size": reach.size,
                    "sinks": reach.sinks,
                    "chunk": isinstance(reach, Chunk),
                }
            )
        data = {"groups": groups, "rows": self._cache.num_rows, "steps": self._steps, "texts": self._texts}
        # "</" would end the script, whatever stands in a text.
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/").replace("<!", "<\\!")
        return _PAGE.replace("TITLE", html.escape(title)).replace("DATA", text)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>TITLE</title>
<style>
:root{color-scheme:light dark;--ink:#222;--ground:#fff;--line:#c8c8c8;--held:#4c78a8;--sink:#7a5195;--new:#54a24b;--dim:#b9c9dc}
@media (prefers-color-scheme:dark){:root{--ink:#ddd;--ground:#16181c;--line:#4a4d55;--held:#5b8fc9;--sink:#a978c9;--new:#6cc062;--dim:#33465c}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--ground);margin:0 auto;padding:1rem;max-width:64rem}
h1{font-size:1.15rem;overflow-wrap:anywhere}h2{font-size:.95rem;margin:1.2rem 0 .3rem}
#bar{position:sticky;top:0;background:var(--ground);padding:.5rem 0;display:flex;gap:.6rem;align-items:center;flex-wrap:wrap}
#at{flex:1 1 12rem;min-width:8rem}button{font:inherit;padding:.2rem .8rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid var(--line);padding-left:.7rem;margin:.4rem 0}
.text .later{opacity:.22}.text .last{background:var(--new);color:#fff;border-radius:3px}
.row{display:flex;flex-wrap:wrap;gap:2px;margin:.2rem 0 .6rem}
.row i{width:9px;height:9px;border:1px solid var(--line);border-radius:2px;box-sizing:border-box}
.row .held{background:var(--dim);border-color:var(--dim)}.row .seen{background:var(--held);border-color:var(--held)}
.row .sink{background:var(--sink);border-color:var(--sink)}.row .new{background:var(--new);border-color:var(--new)}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;font-size:.85rem}.key .row{display:inline-flex;margin:0 .35rem 0 0}
</style></head><body>
<h1>TITLE</h1>
<div id="bar"><button id="play">Play</button><input id="at" type="range" min="0" value="0" aria-label="step"><span id="say"></span></div>
<div class="key"><span><span class="row"><i class="new"></i></span>written in this step</span>
<span><span class="row"><i class="seen"></i></span>visible to the newest query</span>
<span><span class="row"><i class="sink"></i></span>visible sink</span>
<span><span class="row"><i class="held"></i></span>held, not visible</span><span><span class="row"><i></i></span>empty</span></div>
<div id="texts"></div><div id="groups"></div>
<script id="data" type="application/json">DATA</script>
<script>
const d=JSON.parse(document.getElementById("data").textContent),at=document.getElementById("at");
at.max=d.steps.length-1;
const make=(tag,name,parent)=>{const e=document.createElement(tag);e.className=name;parent.append(e);return e};
const spans=d.texts.map(t=>{const box=make("div","text",document.getElementById("texts"));
  return t.map(s=>{const e=make("span","",box);e.textContent=s;return e})});
const cells=d.groups.map(g=>{const box=document.getElementById("groups");make("h2","",box).textContent=g.name;
  return Array.from({length:d.rows},()=>{const line=make("div","row",box);
    return Array.from({length:Math.ceil(g.slots/g.each)},()=>make("i","",line))})});
const sees=(g,q,p)=>p<=q&&(g.size===null||(g.chunk?Math.floor(p/g.size)===Math.floor(q/g.size):p>q-g.size||p<g.sinks));
function draw(n){
  const held=d.groups.map(g=>Array.from({length:d.rows},()=>new Int32Array(g.slots).fill(-1)));
  const newest=new Array(d.rows).fill(-1),fresh=new Set();
  for(let i=0;i<=n;i++){const s=d.steps[i];
    for(const [g,r,slot,p] of s.writes){held[g][r][slot]=p;if(i===n)fresh.add(g+","+r+","+slot)}
    s.queries.forEach((q,r)=>{if(q>=0)newest[r]=q})}
  d.groups.forEach((g,k)=>cells[k].forEach((line,r)=>line.forEach((e,c)=>{
    let name="",told=[];
    for(let s=c*g.each;s<Math.min((c+1)*g.each,g.slots);s++){const p=held[k][r][s];if(p<0)continue;told.push(p);
      const now=fresh.has(k+","+r+","+s)?"new":!sees(g,newest[r],p)?"held":p<g.sinks?"sink":"seen";
      if(name!=="new"&&(name===""||name==="held"||now==="new"))name=now}
    e.className=name;e.title=told.length?"position "+told[0]+(told.length>1?" to "+told[told.length-1]:""):"empty"})));
  spans.forEach((t,r)=>t.forEach((e,i)=>{e.className=i>newest[r]?"later":i===newest[r]?"last":""}));
  document.getElementById("say").textContent="step "+(n+1)+" of "+d.steps.length+", "+d.steps[n].kind;
}
at.oninput=()=>draw(+at.value);
let timer=null;const play=document.getElementById("play");
play.onclick=()=>{if(timer){clearInterval(timer);timer=null;play.textContent="Play";return}
  if(+at.value>=+at.max)at.value=0;play.textContent="Stop";
  timer=setInterval(()=>{at.value=+at.value+1;draw(+at.value);if(+at.value>=+at.max)play.onclick()},120)};
draw(0);
</script></body></html>
"""
