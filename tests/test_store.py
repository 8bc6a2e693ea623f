"""The store does what labml's Cache does, as a pytree; its queues for scans and loops; the store in effect."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import pickle
import random
import re
import threading
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Ring, StackedQueue, Store, get_store, set_store, use_store


def popped(store, name):
    """All values of a queue."""
    values = []
    while store.q_size(name):
        value, store = store.pop(name)
        values.append(value)
    return values


class Labml:
    """labml's Cache, by its documentation (nn.labml.ai, neox/utils/cache)."""

    def __init__(self):
        self.cache = {}

    def clear_all(self):
        self.cache = {}

    def push(self, name, value):
        self.cache.setdefault(name, []).append(value)

    def q_size(self, name):
        queue = self.cache.get(name)
        return len(queue) if type(queue) is list else None

    def pop(self, name):
        return self.cache[name].pop(0)

    def set(self, key, value):
        self.cache[key] = value

    def get(self, key, default=None):
        return self.cache.get(key, default)

    def clear(self, key):
        del self.cache[key]


def outcome(call, *args):
    try:
        return call(*args)
    except (KeyError, IndexError) as error:
        return type(error)


@pytest.mark.parametrize("seed", range(5))
def test_random_programs_do_what_they_do_with_labml(seed):
    rng, model, store = random.Random(seed), Labml(), Store()
    seen = set()
    for i in range(400):
        queue, value = rng.choice(["kv", "past", "more"]), rng.choice(["flag", "ids"])
        name = rng.choice([queue, value])
        match rng.choices(["push", "pop", "set", "get", "q_size", "clear", "clear_all"], [9, 8, 4, 4, 4, 2, 0.3])[0]:
            case "push":
                model.push(queue, i)
                store = store.push(queue, i)
            case "pop":
                want = outcome(model.pop, queue)
                got = outcome(store.pop, queue)
                if isinstance(got, tuple):
                    got, store = got
                seen.add(want if isinstance(want, type) else "popped")
                assert got == want
            case "set":
                new = rng.choice([i, None, True, "text"])
                model.set(value, new)
                store = store.set(value, new)
            case "get":
                assert store.get(value, "default") == model.get(value, "default")
            case "q_size":
                assert store.q_size(name) == model.q_size(name)
            case "clear":
                want = outcome(model.clear, name)
                got = outcome(store.clear, name)
                assert (got is KeyError) == (want is KeyError)
                store = store if got is KeyError else got
            case "clear_all":
                model.clear_all()
                store = store.clear_all()
        assert set(store.names) == set(model.cache)
        assert all((name in store) == (name in model.cache) for name in ("kv", "past", "more", "flag", "ids"))
    assert seen == {"popped", KeyError, IndexError}


def test_a_value_and_a_queue_of_one_name_never_meet():
    store = Store().push("x", 1).set("x", 2)
    assert store.get("x") == 2 and store.q_size("x") == 1 and store.pop("x")[0] == 1
    assert Store().set("x", 2).q_size("x") is None
    with pytest.raises(KeyError, match="no value 'x'"):
        Store().push("x", 1).get("x")
    assert "x" not in store.clear("x")


def test_errors_say_what_there_is():
    store = Store().set("flag", 1).push("kv", 1)
    _, store = store.pop("kv")
    with pytest.raises(KeyError, match=r"no queue 'vk'; values: flag; queues: kv \(0\)"):
        store.pop("vk")
    with pytest.raises(IndexError, match="'kv' is empty"):
        store.pop("kv")
    with pytest.raises(KeyError, match=r"no value 'gone', .*values: flag"):
        store.get("gone")
    with pytest.raises(KeyError, match="no 'gone'; values: flag"):
        store.clear("gone")
    with pytest.raises(ValueError, match="7 is an int; names in a store are strings"):
        store.set(7, 1)
    with pytest.raises(ValueError, match="kv: a set is neither an array nor hashable"):
        store.push("kv", {1})
    for misuse in (lambda s: s.pop("vk"), lambda s: s.get("gone")):
        with pytest.raises(KeyError):
            jax.eval_shape(misuse, store)
    with pytest.raises(IndexError):
        jax.eval_shape(lambda s: s.pop("kv"), store)


def test_none_is_a_value():
    store = Store().set("past", None).push("q", None)
    assert store.get("past", 3) is None and "past" in store
    assert store.pop("q")[0] is None and store.q_size("q") == 1
    assert jax.tree.structure(store) != jax.tree.structure(Store())


def test_no_change_reaches_an_older_store():
    x = np.ones(2)
    items = [1, 2]
    first = Store().push("q", x).set("v", items)
    second = first.push("q", 2 * x).set("v", [3])
    x[:] = 9
    items.append(3)
    assert first.q_size("q") == 1 and first.get("v") == [1, 2] and first.pop("q")[0].tolist() == [1, 1]
    first.get("v").append(7)
    assert first.get("v") == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        first.pop("q")[0][0] = 5
    with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
        first.pop("q")[0].flags.writeable = True
    with pytest.raises(AttributeError):
        first._values = {}
    rest, _ = second.pop("q")[1], second.clear_all()
    assert rest.q_size("q") == 1 and second.q_size("q") == 2


Point = namedtuple("Point", "x y")


class Mode(enum.IntEnum):
    PREFILL = 0
    DECODE = 1


def test_any_pytree_is_a_value_and_what_jax_cannot_trace_is_structure():
    store = Store().set("mode", Mode.DECODE).set("at", Point(jnp.ones(2), "name")).set("use", True).push("n", (1, None))

    @jax.jit
    def step(store):
        assert store.get("mode") is Mode.DECODE and store.get("use") is True and store.get("at").y == "name"
        assert isinstance(store.pop("n")[0][0], jax.core.Tracer)
        return store.set("at", store.get("at")._replace(x=store.get("at").x + 1))

    after = step(store)
    assert jax.tree.structure(after) == jax.tree.structure(store)
    assert after.get("at").x.tolist() == [2, 2] and after.get("use") is True
    for other in (False, "True", Mode.DECODE):  # that enum equals True
        assert jax.tree.structure(store.set("use", other)) != jax.tree.structure(store)
    moved = jax.device_put(store, jax.devices()[1])
    assert moved.get("at").x.devices() == {jax.devices()[1]} and moved.get("mode") is Mode.DECODE
    assert pickle.loads(pickle.dumps(store)).get("mode") is Mode.DECODE


def test_a_step_that_pushes_as_often_as_it_pops_compiles_once():
    traced = []

    @jax.jit
    def step(store, x):
        traced.append(1)
        for _ in range(3):
            past, store = store.pop("kv")
            store = store.push("kv", past + x)
        return store.set("length", store.get("length") + 1)

    store = Store().set("length", jnp.int32(0))
    for i in range(3):
        store = store.push("kv", jnp.full(2, 10.0 * i))
    for _ in range(5):
        store = step(store, 1.0)
    assert len(traced) == 1
    assert int(store.get("length")) == 5
    assert [float(kv[0]) for kv in popped(store, "kv")] == [5, 15, 25]


def test_an_emptied_queue_stays_so_that_the_structure_is_kept():
    store = Store().push("kv", jnp.ones(2))
    kv, popped = store.pop("kv")
    assert popped.q_size("kv") == 0 and "kv" in popped
    assert jax.tree.structure(popped.push("kv", kv)) == jax.tree.structure(store)
    assert jax.tree.structure(popped) != jax.tree.structure(Store())


def test_order_of_names_is_no_structure():
    assert jax.tree.structure(Store().set("a", 1).set("b", 2)) == jax.tree.structure(Store().set("b", 1).set("a", 2))


def test_a_failed_step_keeps_the_old_store():
    store = Store().push("kv", jnp.ones(2))

    def step(store):
        _, store = store.pop("kv")
        store = store.push("kv", jnp.zeros(2))
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        jax.jit(step)(store)
    assert store.pop("kv")[0].tolist() == [1, 1]


def test_it_works_under_grad_vmap_scan_and_while():
    store = Store().set("scale", 3.0).push("x", jnp.arange(4.0))

    def loss(store):
        x, rest = store.pop("x")
        return (rest.get("scale") * x**2).sum()

    gradient = jax.grad(loss)(store)
    assert float(gradient.get("scale")) == 14.0
    np.testing.assert_allclose(gradient.pop("x")[0], 6 * np.arange(4.0))
    batched = jax.vmap(lambda x: Store().push("x", x).set("y", x + 1))(jnp.arange(3.0))
    assert batched.get("y").tolist() == [1, 2, 3]

    def body(store, x):
        past, store = store.pop("x")
        return store.push("x", past + x), past[0]

    last, firsts = jax.lax.scan(body, store, jnp.arange(3.0))
    assert last.pop("x")[0].tolist() == [3, 4, 5, 6] and firsts.tolist() == [0, 0, 1]
    start = Store().set("n", jnp.int32(0))
    assert int(jax.lax.while_loop(lambda s: s.get("n") < 7, lambda s: s.set("n", s.get("n") + 2), start).get("n")) == 8


@pytest.mark.optimized
def test_donated_buffers_are_written_in_place_and_shardings_stay():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    store = Store().push("kv", jnp.zeros((8, 64)))

    def step(store, i):
        kv, store = store.pop("kv")
        return store.push("kv", kv.at[:, i].set(1.0))

    compiled = jax.jit(step, donate_argnums=0).lower(store, jnp.int32(1)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 8 * 64 * 4
    moved = jax.jit(step)(jax.device_put(store, sharding), jnp.int32(1))
    assert moved.pop("kv")[0].sharding.is_equivalent_to(sharding, 2)


def test_it_prints_shapes_not_contents():
    store = Store().set("length", jnp.int32(3)).set("use", True).push("kv", (jnp.ones((2, 3), jnp.bfloat16), None))
    assert repr(store) == "Store(values: length=int32[], use=True; queues: kv=[(bfloat16[2,3], None)])"
    assert repr(Store()) == "Store()"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(store)]
    assert paths == [".values['length']", ".queues['kv'][0][0]"]


# StackedQueue


def layers(n=3):
    return [{"k": jnp.full((2,), float(i)), "v": jnp.full((1, 2), i)} for i in range(n)]


def test_a_stacked_queue_is_made_from_a_list_and_gives_it_back():
    queue = StackedQueue.of(layers())
    assert len(queue) == 3 and queue.stacked["v"].shape == (3, 1, 2)
    for got, want in zip(queue.to_list(), layers(), strict=True):
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), got, want))
    assert StackedQueue.of([None, None]).to_list() == [None, None]


def test_a_scan_pops_each_value_and_pushes_what_the_body_returns_like_a_queue_of_the_store():
    def block(x, past, weight):
        k = past["k"] + x
        return (x * weight + k.sum()), {"k": k, "v": past["v"] + 1}

    weights = jnp.array([1.0, 2.0, 3.0])
    x, store = jnp.float32(0.5), Store()
    for past in layers():
        store = store.push("kv", past)
    for weight in weights:
        past, store = store.pop("kv")
        x, new = block(x, past, weight)
        store = store.push("kv", new)
    got, queue = jax.jit(lambda queue: queue.scan(block, jnp.float32(0.5), weights))(StackedQueue.of(layers()))
    np.testing.assert_allclose(got, x, rtol=1e-6)
    for value in queue.to_list():
        want, store = store.pop("kv")
        np.testing.assert_allclose(value["k"], want["k"], rtol=1e-6)
        np.testing.assert_array_equal(value["v"], want["v"])


def test_a_stacked_queue_may_change_its_structure_and_keeps_its_length_under_a_batch_axis():
    _, queue = StackedQueue.of([None, None]).scan(lambda carry, _: (carry + 1, jnp.full(3, carry)), 0)
    assert [value[0] for value in queue.to_list()] == [0, 1]
    batched = jax.vmap(lambda x: StackedQueue.of([x, 2 * x]))(jnp.ones((5, 3)))
    assert len(batched) == 2
    assert jax.vmap(lambda q: q.scan(lambda c, x: (c + x.sum(), x), 0.0)[0])(batched).tolist() == [9.0] * 5


def test_values_that_do_not_fit_together_are_named():
    one, *_ = layers()
    with pytest.raises(ValueError, match=r"value 2\['v'\] is int32\[2\], value 0 is int32\[1, 2\]"):
        StackedQueue.of([one, one, one | {"v": jnp.ones(2, jnp.int32)}])
    with pytest.raises(ValueError, match=r"value 1\['k'\] is float16\[2\], value 0 is float32\[2\]"):
        StackedQueue.of([one, one | {"k": jnp.ones(2, jnp.float16)}])
    with pytest.raises(ValueError, match=r"value 1 has the structure .*'k'.*, value 0 has .*'v'"):
        StackedQueue.of([one, {"k": one["k"]}])
    with pytest.raises(ValueError, match="there is no value"):
        StackedQueue.of([])
    with pytest.raises(ValueError, match=r"xs\['w'\] has shape \(2, 4\); the queue has 3 values"):
        StackedQueue.of(layers()).scan(lambda c, value, x: (c, value), 0, {"w": jnp.ones((2, 4))})


# Ring


def test_a_ring_does_what_a_bounded_list_does():
    ring, model = Ring.init(3, jnp.int32(0)), []
    push, pop = jax.jit(Ring.push), jax.jit(Ring.pop)
    rng = random.Random(0)
    seen = set()
    for i in range(1, 120):
        assert (int(ring.size), bool(ring.empty), bool(ring.full)) == (len(model), not model, len(model) == 3)
        if rng.random() < 0.5 + 0.3 * (-1) ** (i // 20):
            ring, ok = push(ring, i)
            assert bool(ok) == (len(model) < 3)
            seen.add(("push", bool(ok)))
            model += [i] if ok else []
        else:
            head, there = ring.peek()
            value, ring, ok = pop(ring)
            assert (int(value), bool(ok)) == (int(head), bool(there)) == ((model[0], True) if model else (0, False))
            seen.add(("pop", bool(ok)))
            model = model[1:]
    assert len(seen) == 4


def test_what_does_not_fit_changes_nothing():
    ring = Ring.init(2, {"x": jnp.zeros(2)})
    for _ in range(2):
        ring, _ = ring.push({"x": jnp.ones(2)})
    same, ok = ring.push({"x": jnp.full(2, 5.0)})
    assert not ok and jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), same, ring))
    _, empty, _ = ring.pop()[1].pop()
    value, same, ok = empty.pop()
    assert not ok and value["x"].tolist() == [0, 0]
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), same, empty))


def test_a_ring_drives_a_while_loop():
    def body(carry):
        ring, steps = carry
        n, ring, _ = ring.pop()
        ring = jax.lax.cond(n > 1, lambda: ring.push(n // 2)[0].push(n // 2)[0], lambda: ring)
        return ring, steps + 1

    ring, _ = Ring.init(8, 0).push(8)
    ring, steps = jax.lax.while_loop(lambda carry: ~carry[0].empty, body, (ring, 0))
    assert int(steps) == 15


def test_a_ring_in_scan_grad_and_vmap():
    def total(xs):
        def body(ring, x):
            ring, ok = ring.push(x**2)
            return ring, ok

        ring, oks = jax.lax.scan(body, Ring.init(2, jax.ShapeDtypeStruct((), jnp.float32)), xs)
        first, ring, _ = ring.pop()
        return first + 10 * ring.pop()[0], oks

    xs = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    gradients, oks = jax.vmap(jax.grad(total, has_aux=True))(xs)
    assert gradients.tolist() == [[2, 40, 0], [8, 100, 0]]
    assert oks.tolist() == [[True, True, False]] * 2


@pytest.mark.optimized
def test_a_ring_is_written_in_place():
    ring = Ring.init(4, jnp.zeros(1 << 16))
    size = 4 * (1 << 16) * 4

    def push_all(ring):
        return jax.lax.fori_loop(0, 9, lambda i, ring: ring.push(jnp.full(1 << 16, i, jnp.float32))[0], ring)

    for function in (lambda ring: ring.push(jnp.ones(1 << 16))[0], push_all):
        memory = jax.jit(function, donate_argnums=0).lower(ring).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= size
        assert memory.temp_size_in_bytes < size


def test_a_ring_names_what_does_not_fit_it():
    ring = Ring.init(2, {"x": jnp.zeros(2)})
    with pytest.raises(
        ValueError, match=r"push: the value\['x'\] is float32\[3\], what the ring was made for is float32\[2\]"
    ):
        ring.push({"x": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"is int32\[2\], .* is float32\[2\]"):
        ring.push({"x": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match="has the structure"):
        ring.push([jnp.zeros(2)])
    assert Ring.init(np.int32(2), 0).capacity == 2 and type(Ring.init(np.int64(2), 0).capacity) is int
    for capacity in (0, -1, True, 1.5, np.True_, "2", None):
        with pytest.raises(ValueError, match="at least 1"):
            Ring.init(capacity, 0)


def test_a_python_number_that_a_ring_cannot_hold_is_refused():
    for dtype, number in ((int, 1.5), (int, 2.0), (bool, 1.0), (float, 1j), (int, 10**30)):
        ring = Ring.init(2, {"x": jnp.zeros((), dtype)})
        with pytest.raises(ValueError, match=rf"push: the value has {re.escape(repr(number))}, .* made for is \w+"):
            ring.push({"x": number})
    for dtype, number in (
        (jnp.float16, 1e9),
        (jnp.float16, 70_000),
        (jnp.float16, 10**30),
        (float, 1e39),
        (jnp.int8, 300),
        (jnp.uint8, -1),
        (int, np.int64(2**40)),
        (float, np.float64(1e300)),
        (complex, 1e300j),
    ):
        ring = Ring.init(2, {"x": jnp.zeros((), dtype)})
        with pytest.raises(ValueError, match=r"push: the value has .*, which \w+ can't hold; take a wider dtype "):
            ring.push({"x": number})
    with pytest.raises(ValueError, match=r"StackedQueue\.of: value 1 has 1099511627776, which int32 can't hold"):
        StackedQueue.of([np.int64(1), np.array(2**40)])
    assert Ring.init(2, 0).push(np.int64(7))[0].peek()[0].item() == 7
    with jax.enable_x64(True):
        assert Ring.init(2, np.int64(0)).push(np.int64(2**40))[0].peek()[0].item() == 2**40
    assert Ring.init(2, 0.0).push(float("inf"))[0].peek()[0].item() == float("inf")
    for dtype, number in ((float, 2), (jnp.bfloat16, 1.5), (complex, 1.5), (int, True), (bool, True), (float, 2**100)):
        assert Ring.init(2, jnp.zeros((), dtype)).push(number)[0].peek()[0].item() == number


# The store in effect


def test_leaving_a_scope_restores_what_was_there_by_whichever_way():
    with use_store():
        set_store(Store().set("level", 1))
        with use_store(Store().set("level", 2)):
            set_store(get_store().set("level", 3))
            assert get_store().get("level") == 3
        assert get_store().get("level") == 1
        with pytest.raises(KeyError), use_store():  # noqa: PT012
            set_store(Store().set("level", 4))
            layer(1.0)
        assert get_store().get("level") == 1
    assert get_store().names == ()
    with pytest.raises(ValueError, match=r"is a dict; give a jaxkv\.Store"):
        set_store({})


def test_without_a_scope_it_stays_for_the_thread_and_no_other():
    def program():
        set_store(Store().set("x", 1))
        seen = []
        thread = threading.Thread(target=lambda: seen.append(get_store().names))
        thread.start()
        thread.join()
        return get_store().names, seen

    assert contextvars.Context().run(program) == (("x",), [()])
    assert get_store().names == ()


def test_asyncio_tasks_do_not_see_one_another():
    async def task(name, turn, other):
        set_store(get_store().push("mine", name))
        turn.set()
        await other.wait()  # both have pushed now
        return popped(get_store(), "mine")

    async def program():
        one, two = asyncio.Event(), asyncio.Event()
        with use_store(Store().push("mine", "shared")):
            found = await asyncio.gather(task("a", one, two), task("b", two, one))
            return found, get_store().q_size("mine")

    assert asyncio.run(program()) == ([["shared", "a"], ["shared", "b"]], 1)


def layer(x):
    past, store = get_store().pop("past")
    set_store(store.push("past", x))
    return past + x


def test_imperative_layers_run_under_jit_with_the_store_as_argument_and_result():
    traced = []

    @jax.jit
    def step(store, x):
        traced.append(1)
        with use_store(store):
            return layer(layer(x)), get_store()

    store = Store().push("past", 1.0).push("past", 2.0)
    want = []
    with use_store(store):
        for x in (3.0, 4.0):
            want.append(layer(layer(x)))
    got = []
    for x in (3.0, 4.0):
        y, store = step(store, x)
        got.append(float(y))
    assert got == want and len(traced) == 1
    assert get_store().names == ()


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.vmap, jax.grad, jax.checkpoint, lambda f: lambda x: jax.lax.scan(f, 0.0, x)]
)
@pytest.mark.parametrize("scope", [False, True])
def test_tracers_cannot_leak_through_it(transform, scope):
    def leak(x, *_):
        set_store(Store().set("x", x))
        return x

    x = 1.0 if transform is jax.grad else jnp.ones(2)
    with use_store(Store().set("kept", 1)) if scope else use_store():
        before = get_store()
        with pytest.raises(jaxkv.CacheError, match=r"set_store: .* open `with jaxkv.use_store\(store\):` inside"):
            transform(leak)(x)
        assert get_store() is before


def test_a_jitted_function_cannot_bake_in_what_it_would_read_only_once():
    with use_store(Store().set("scale", 2.0)):
        with pytest.raises(jaxkv.CacheError, match="get_store: the store in effect belongs to another trace"):
            jax.jit(lambda x: x * get_store().get("scale"))(1.0)
        with jax.disable_jit():
            assert jax.jit(lambda x: x * get_store().get("scale"))(1.0) == 2.0


def test_a_scan_inside_of_jit_opens_a_scope_of_its_own():
    @jax.jit
    def run(store, xs):
        def body(store, x):
            with use_store(store):
                y = layer(x)
                return get_store(), y

        with use_store(store):
            with pytest.raises(jaxkv.CacheError, match="another trace"):
                jax.lax.scan(lambda c, x: (c, layer(x)), 0.0, xs)
            store, ys = jax.lax.scan(body, get_store(), xs)
        return store, ys

    store, ys = run(Store().push("past", 0.0), jnp.arange(1.0, 4.0))
    assert ys.tolist() == [1, 3, 5] and float(store.pop("past")[0]) == 3
