"""Named arrays in files."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import safetensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [*safetensors.DTYPES.values()])
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
    safetensors.write(path, tensors, metadata={"made by": "a test"})
    file = safetensors.File(path)
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
    safetensors.write(path, tensors, metadata={"format": "np"})
    for name, tensor in package.load_file(path).items():
        np.testing.assert_array_equal(tensor, tensors[name])
    package.save_file(tensors, path)
    for name, tensor in safetensors.File(path).items():
        np.testing.assert_array_equal(tensor, tensors[name])


@pytest.mark.parametrize("kept", [0, 7, 30, -1])
def test_a_file_that_is_cut_short_is_refused(path, kept):
    safetensors.write(path, {"w": np.ones(50, np.float32)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut short"):
        safetensors.File(path)


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
        safetensors.File(path)


def test_an_unknown_dtype_is_named(path):
    header = b'{"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(1))
    with pytest.raises(ValueError, match="w has dtype F4; known are F64, F32"):
        safetensors.File(path)
    with pytest.raises(ValueError, match="w is complex64; safetensors knows float64"):
        safetensors.write(path, {"w": np.ones(2, np.complex64)})


def test_a_failed_write_leaves_the_old_file(path):
    class Broken:
        dtype, shape = np.dtype("float32"), (2,)

        def __array__(self, *args, **kwargs):
            raise OSError("gone")

    safetensors.write(path, {"w": np.ones(2)})
    with pytest.raises(OSError, match="gone"):
        safetensors.write(path, {"w": Broken()})
    assert safetensors.File(path)["w"].tolist() == [1.0, 1.0]
    assert list(path.parent.iterdir()) == [path]


def test_metadata_that_is_no_text_is_refused_before_anything_is_written(path):
    for metadata, text in [
        ({"step": 3}, r"'step': 3 has a int, .* give str\(3\)"),
        ({3: "step"}, r"3: 'step' has a int, .* give str\(3\)"),
        ({"a": None}, "has a NoneType"),
        ([("a", "b")], r"metadata=\[\('a', 'b'\)\]: give strings by name"),
        ("text", "give strings by name"),
    ]:
        with pytest.raises(ValueError, match=text):
            safetensors.write(path, {"w": np.ones(2)}, metadata=metadata)
    assert not list(path.parent.iterdir())
    safetensors.write(path, {"w": np.ones(2)}, metadata={})
    assert safetensors.File(path).metadata == {}


def test_floating_arrays_are_cast_to_floating_dtypes_alone(path):
    for dtype in ("int8", "bool", "bf16", "float4_e2m1fn", "complex64", 3):
        with pytest.raises(ValueError, match=f"dtype={dtype!r}: .* float32, float16, bfloat16, float8_e4m3fn, .*None"):
            safetensors.write(path, {"w": np.ones(2)}, dtype=dtype)
    assert not list(path.parent.iterdir())
    for dtype in ("float16", jnp.bfloat16, np.float32, np.dtype("float64"), jnp.float8_e5m2):
        safetensors.write(path, {"w": np.ones(2), "n": np.arange(2)}, dtype=dtype)
        file = safetensors.File(path)
        assert (file.kind("w"), file.kind("n")) == (jnp.dtype(dtype), np.dtype("int64"))


def test_a_folder_that_is_not_there_or_is_given_as_the_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"no such folder to save into; make it first: '.*gone'"):
        safetensors.write(path.parent / "gone" / "w.safetensors", {"w": np.ones(2)})
    with pytest.raises(IsADirectoryError, match=f"this is a folder; give the name of a file: '{path.parent}'"):
        safetensors.write(path.parent, {"w": np.ones(2)})
