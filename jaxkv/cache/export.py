"""Caches in programs that `jax.export` writes to a file: their static parts as JSON."""

from __future__ import annotations

import json

import jax.export

from jaxkv.cache.cache import Cache
from jaxkv.cache.cross import Encoded
from jaxkv.cache.group import Group
from jaxkv.cache.layer import Layer
from jaxkv.cache.pages import Pages, PageStep
from jaxkv.cache.plain import exportable, made_of, plain
from jaxkv.cache.pool import Pool
from jaxkv.cache.recurrent import States, StateStep
from jaxkv.cache.rows import Rows
from jaxkv.cache.spec import Chunk, Cross, Full, LayerSpec, Recurrent, SideBuffer, Window
from jaxkv.cache.state_layer import StateLayer
from jaxkv.cache.step import GroupStep, Step
from jaxkv.cache.tree import Tree

for _part in (Full, Window, Chunk, Cross, Recurrent, LayerSpec, SideBuffer, Rows, Pages):
    exportable(_part)

for _node in (Cache, Layer, StateLayer, Group, States, Encoded, Pool, Step, GroupStep, StateStep, PageStep, Tree):
    jax.export.register_pytree_node_serialization(
        _node,
        serialized_name=f"jaxkv.{_node.__name__}",
        serialize_auxdata=lambda static: json.dumps(plain(static)).encode(),
        deserialize_auxdata=lambda text: made_of(json.loads(text.decode())),
    )
