"""Parameters in files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkv.models import weights
from jaxkv.models.decoder import Decoder, DecoderConfig


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def small(**changes):
    return Decoder(
        DecoderConfig(**{"vocab_size": 7, "width": 8, "num_layers": 2, "num_heads": 2} | changes), rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_comes_back_as_it_was_saved(path, dtype):
    state = nnx.state(small())
    weights.save(path, state, dtype=dtype)
    back = weights.load(path, jax.eval_shape(lambda: state), dtype=dtype)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert new.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(new, old.astype(dtype))


def test_names_are_paths_joined_by_dots():
    names = set(weights.named(nnx.state(small(qk_norm=True, tied=False))))
    assert {"embed.embedding", "head.kernel", "norm.scale", "layers.1.mlp.gate.kernel"} <= names
    assert {"layers.0.attention.query.kernel", "layers.0.attention.query_norm.scale"} <= names
    assert names == set(weights.named(nnx.to_pure_dict(nnx.state(small(qk_norm=True, tied=False)))))


@pytest.mark.parametrize("dtype", [*weights.DTYPES.values()])
def test_every_dtype_layout_and_shape_comes_back(path, dtype):
    square = np.arange(12).reshape(3, 4).astype(jnp.dtype(dtype))
    tensors = {
        "square": square,
        "transposed": square.T,
        "strided": square[::2, 1:],
        "scalar": square[1, 1],
        "empty": square[:0],
        "an odd number of bytes": np.ones(3, np.int8),
    }
    weights.write(path, tensors, metadata={"made by": "a test"})
    file = weights.File(path)
    assert file.metadata == {"made by": "a test"}
    assert set(file) == set(tensors)
    for name, tensor in tensors.items():
        assert file[name].dtype == tensor.dtype
        np.testing.assert_array_equal(file[name], tensor)


def test_the_safetensors_package_reads_what_is_written_and_writes_what_is_read(path):
    package = pytest.importorskip("safetensors.numpy")
    tensors = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.arange(4, dtype=np.int32),
        "c": np.ones((1,), bool),
    }
    weights.write(path, tensors, metadata={"format": "np"})
    for name, tensor in package.load_file(path).items():
        np.testing.assert_array_equal(tensor, tensors[name])
    package.save_file(tensors, path)
    for name, tensor in weights.File(path).items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_all_that_does_not_fit_is_said_at_once(path):
    tensors = weights.named(nnx.state(small()))
    tensors["norm.scale"] = jnp.ones(9)
    del tensors["layers.1.mlp.up.kernel"]
    weights.write(path, tensors | {"lm_head": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="does not fit the model") as error:
        weights.load(path, nnx.state(small()))
    assert str(error.value).splitlines()[1:] == [
        "  missing: layers.1.mlp.up.kernel (8, 32)",
        "  shape: norm.scale is (9,) in the file, (8,) in the model",
        "  unknown: lm_head (2, 3)",
    ]


def test_names_may_differ_in_the_file(path):
    weights.write(path, {"model.w": np.ones(2, np.float32)})
    assert weights.load(path, {"w": jnp.zeros(2)}, rename=lambda name: f"model.{name}")["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kept", [0, 7, 30, -1])
def test_a_file_that_is_cut_short_is_refused(path, kept):
    weights.write(path, {"w": np.ones(50, np.float32)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut short"):
        weights.File(path)


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"[]",
        b'{"w": 3}',
        b'{"w": {"dtype": "F32"}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
    ],
)
def test_a_header_that_is_none_is_refused(path, header):
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="no safetensors file"):
        weights.File(path)


def test_an_unknown_dtype_is_named(path):
    header = b'{"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(1))
    with pytest.raises(ValueError, match="w has dtype F4; known are F64, F32"):
        weights.File(path)
    with pytest.raises(ValueError, match="w is complex64; safetensors knows float64"):
        weights.write(path, {"w": np.ones(2, np.complex64)})


def test_a_failed_write_leaves_the_old_file(path):
    class Broken:
        dtype, shape = np.dtype("float32"), (2,)

        def __array__(self, *args, **kwargs):
            raise OSError("gone")

    weights.write(path, {"w": np.ones(2)})
    with pytest.raises(OSError, match="gone"):
        weights.write(path, {"w": Broken()})
    assert weights.File(path)["w"].tolist() == [1.0, 1.0]
    assert list(path.parent.iterdir()) == [path]
