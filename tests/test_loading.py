"""Checkpoints as people have them give the params that transformers gives, and what was decided is said."""

import functools
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import safetensors
from jaxkv.models import fp8, mxfp4

GOLDEN = Path(__file__).parent / "golden"
HEADS = {"gpt2": "lm_head.weight", "whisper": "proj_out.weight"}
TABLES = {"gpt2": "transformer.wte.weight", "whisper": "model.decoder.embed_tokens.weight"}
INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"


def head_and_table(name):
    return HEADS.get(name, "lm_head.weight"), TABLES.get(name, "model.embed_tokens.weight")


@functools.cache
def model_of(name, dtype="float32"):
    return jaxkv.models.load(GOLDEN / "families" / name, dtype=dtype)


@functools.cache
def expected(name):
    return dict(safetensors.File(GOLDEN / name / "expected.safetensors"))


@pytest.fixture
def changed(tmp_path):
    """Writes a checkpoint of which tensors or fields were changed, and returns its directory."""

    def write(name, change=lambda tensors: None, **fields):
        source = GOLDEN / name if (GOLDEN / name).exists() else GOLDEN / "families" / name
        tensors = dict(jaxkv.models.Files(source))
        change(tensors)
        safetensors.write(tmp_path / "model.safetensors", tensors)
        config = json.loads((source / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | fields))
        return tmp_path

    return write


def assert_same_params(got, want):
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def assert_logits(model, name):
    got = model.module(jnp.asarray(expected(name)["tokens"])[None])[0]
    np.testing.assert_allclose(got, expected(name)["logits"], rtol=0, atol=2e-4)


# Tied tables. transformers 5.24: with both there and unequal they are not tied, whatever config.json says; with one of
# them there it is both.


def test_a_head_of_other_numbers_is_used_though_config_json_ties_it(changed, tmp_path, caplog):
    directory = changed("llama2", tie_word_embeddings=True)  # whose head is its own
    with caplog.at_level(logging.WARNING, "jaxkv"):
        model = jaxkv.models.load(directory, dtype="float32")
    assert not model.config.tied
    assert_logits(model, "families/llama2")
    (note,) = model.notes
    assert "the files hold an output head of other numbers than the embedding: that head is used" in note
    assert caplog.messages == [f"{directory}: {note}"]
    jaxkv.models.save(tmp_path / "again", model)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    again = jaxkv.models.load(tmp_path / "again")
    assert_same_params(again, model)
    assert again.notes == () and not again.config.tied


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gpt2", "whisper"])
def test_a_head_that_is_the_table_or_takes_its_place_is_tied(name, changed):
    head, table = head_and_table(name)
    for keep in (True, False):
        directory = changed(name, lambda t: t.update({head: t[table] if keep else t.pop(table)}))  # noqa: B023
        model = jaxkv.models.load(directory, dtype="float32")
        assert_same_params(model, model_of(name))
        assert model.config.tied and model.notes == ()


@pytest.mark.parametrize("name", ["gpt2", "whisper"])
def test_other_heads_of_every_family_are_used(name, changed):
    head, table = head_and_table(name)
    model = jaxkv.models.load(changed(name, lambda t: t.update({head: t[table][::-1]})), dtype="float32")
    embedding = model.params["embed"]["embedding"]
    np.testing.assert_array_equal(model.params["head"]["kernel"], embedding[::-1].T)
    assert len(model.notes) == 1


def test_whether_tables_are_the_same_is_asked_in_the_dtype_of_the_model(changed):
    def almost(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(np.float32) * np.float32(1 + 1e-6)

    directory = changed("llama3", almost)
    assert jaxkv.models.load(directory, dtype="bfloat16").config.tied
    assert not jaxkv.models.load(directory, dtype="float32").config.tied


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        (
            "llama2",
            ["lm_head.weight"],
            r'missing: lm_head\.weight \(96, 24\); if it is the table .* "tie_word_embeddings"',
        ),
        ("llama2", ["model.embed_tokens.weight"], r"missing: model\.embed_tokens\.weight \(96, 24\)$"),
        ("llama3", ["model.embed_tokens.weight"], r"missing: model\.embed_tokens\.weight \(96, 24\)$"),
    ],
)
def test_what_no_other_tensor_stands_for_is_missing(name, lost, message, changed):
    with pytest.raises(ValueError, match=message):
        jaxkv.models.load(changed(name, lambda t: [t.pop(gone) for gone in lost]))


def test_a_head_of_another_shape_is_said(changed):
    directory = changed("llama3", lambda t: t.update({"lm_head.weight": np.ones((97, 24), np.float32)}))
    with pytest.raises(ValueError, match=r"shape: lm_head\.weight is \(97, 24\) in the file, \(96, 24\) in the model"):
        jaxkv.models.load(directory)


# What is computed here, and lies in the file besides.


def frequencies(name, layer=0, *, scaled):
    rotary = model_of(name).config.layer_rotary(layer)
    theta, dim = rotary.theta, model_of(name).config.head_dim
    return (rotary.frequencies(dim) if scaled else theta ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)


def test_frequencies_that_config_json_gives_too_are_passed_over(changed):
    def add(tensors):
        tensors[INV_FREQ.format(0)] = frequencies("llama3", scaled=True)
        tensors[INV_FREQ.format(1)] = frequencies("llama3", scaled=False).astype(jnp.bfloat16)
        tensors["model.rotary_emb.inv_freq"] = frequencies("llama3", scaled=True)

    model = jaxkv.models.load(changed("llama3", add), dtype="float32")
    assert_same_params(model, model_of("llama3"))
    assert model.notes == ()


def test_other_frequencies_are_told_and_those_of_config_json_are_used(changed):
    def add(tensors):
        for layer in (0, 2):
            tensors[INV_FREQ.format(layer)] = 2 * frequencies("llama3", scaled=True)

    model = jaxkv.models.load(changed("llama3", add), dtype="float32")
    assert_same_params(model, model_of("llama3"))
    (note,) = model.notes
    assert note.startswith(f"{INV_FREQ.format(0)} and 1 like it: not the frequencies that config.json asks for")
    assert_logits(model, "families/llama3")  # as transformers, which doesn't read them


def test_masks_of_gpt2_are_passed_over_and_others_told(changed):
    causal = np.tri(96, dtype=np.uint8)

    def add(tensors, mask=causal, score=-1e4):
        tensors["transformer.h.0.attn.bias"] = mask[None, None]
        tensors["transformer.h.0.attn.masked_bias"] = np.array(score, np.float32)

    model = jaxkv.models.load(changed("gpt2", add), dtype="float32")
    assert_same_params(model, model_of("gpt2"))
    assert model.notes == ()
    for odd in ({"mask": np.ones((96, 96), bool)}, {"mask": np.tri(95)}, {"score": 0}, {"score": np.nan}):
        model = jaxkv.models.load(changed("gpt2", functools.partial(add, **odd)), dtype="float32")
        assert_same_params(model, model_of("gpt2"))
        assert len(model.notes) == 1 and "in transformers" in model.notes[0]


def test_positions_are_passed_over_and_others_told(changed):
    for ids, told in ((np.arange(96)[None], 0), (np.arange(1, 97), 1), (np.ones(3, np.float32), 1)):
        model = jaxkv.models.load(changed("gpt2", lambda t: t.update({"position_ids": ids})), dtype="float32")  # noqa: B023
        assert_same_params(model, model_of("gpt2"))
        assert len(model.notes) == told


def test_two_tensors_of_one_name_are_refused(changed):
    directory = changed("gpt2", lambda t: t.update({"wte.weight": t["transformer.wte.weight"]}))
    with pytest.raises(ValueError, match=r"holds transformer\.wte\.weight and wte\.weight, which are the same tensor"):
        jaxkv.models.load(directory)


def test_numbers_of_layers_that_no_int_holds_are_unknown(changed):
    odd = INV_FREQ.format("9" * 5000)
    directory = changed(
        "llama3", lambda t: t.update({odd: np.ones(4), odd.replace("rotary_emb.inv_freq", "q"): np.ones(4)})
    )
    with pytest.raises(ValueError, match=r"does not fit its config\.json:\n  unknown: model\.layers\.9{100,}"):
        jaxkv.models.load(directory)


def test_names_that_a_terminal_would_obey_are_written_out(changed):
    directory = changed("gpt2", lambda t: t.update({"transformer.\x1b[2J\n" + 1000 * "x": np.ones(1)}))
    with pytest.raises(ValueError) as error:
        jaxkv.models.load(directory)
    assert r"unknown: 'transformer.\x1b[2J\n" in str(error.value) and len(str(error.value)) < 500


# Dtypes.


def test_stop_and_suppressed_tokens_that_the_model_does_not_have_are_left_out(changed):
    directory = changed("llama3", eos_token_id=999)
    assert jaxkv.models.load(directory).generation.stop_tokens == ()
    said = {"eos_token_id": [2, 999], "suppress_tokens": [5, 999], "begin_suppress_tokens": [999]}
    (directory / "generation_config.json").write_text(json.dumps(said))
    generation = jaxkv.models.load(directory).generation
    assert generation == jaxkv.models.GenerationConfig(stop_tokens=(2,), suppress_tokens=(5,))


def test_float64_is_loaded_as_float32(changed):
    directory = changed("gemma2", lambda t: t.update({name: tensor.astype(np.float64) for name, tensor in t.items()}))
    model = jaxkv.models.load(directory)
    assert model.config.dtype == "float32"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}
    assert_same_params(model, model_of("gemma2"))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    sharded = jaxkv.models.load(directory, sharding=jaxkv.models.tensor_parallel(mesh))
    assert_same_params(sharded, model)


def test_mixed_dtypes_are_loaded_in_that_of_most(changed):
    def norms(tensors):
        tensors.update({name: x.astype(np.float32) for name, x in tensors.items() if "norm" in name})
        tensors[INV_FREQ.format(0)] = np.arange(4)  # of integers, and not read

    model = jaxkv.models.load(changed("qwen3", norms))
    assert model.config.dtype == "bfloat16"
    assert_same_params(model, model_of("qwen3", "bfloat16"))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bf16", 3])
def test_dtypes_that_params_can_not_have_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"dtype={dtype}: .* give bfloat16, float16 or float32"):
        jaxkv.models.load(GOLDEN / "families" / "gpt2", dtype=dtype)


def test_float64_is_computed_where_jax_has_it():
    with pytest.raises(
        ValueError, match=r'dtype=float64: JAX has it after jax\.config\.update\("jax_enable_x64", True\)'
    ):
        jaxkv.models.load(GOLDEN / "families" / "gpt2", dtype="float64")


# gpt-oss in MXFP4.


@functools.cache
def packed():
    return jaxkv.models.load(GOLDEN / "mxfp4", dtype="float32")


def test_packed_experts_are_unpacked_as_by_transformers():
    model = packed()
    assert (model.config.experts.num_experts, model.notes) == (3, ())
    mlp, unpacked = model.params["layers"][0]["mlp"], expected("mxfp4")["unpacked"]
    np.testing.assert_array_equal(mlp["gate"][0], unpacked[:, ::2])
    np.testing.assert_array_equal(mlp["up"][0], unpacked[:, 1::2])
    assert_logits(model, "mxfp4")


def test_packed_experts_are_loaded_in_any_dtype_onto_any_devices():
    assert jaxkv.models.load(GOLDEN / "mxfp4").config.dtype == "bfloat16"  # that of what isn't packed
    half = jaxkv.models.load(GOLDEN / "mxfp4", dtype="bfloat16").params["layers"][1]["mlp"]["down"]
    np.testing.assert_array_equal(half, packed().params["layers"][1]["mlp"]["down"])  # every number is exact
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))

    def place(name, shape):
        axes = (None, "a", "b") if name.endswith((".gate", ".up", ".down")) else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    sharded = jaxkv.models.load(GOLDEN / "mxfp4", dtype="float32", sharding=place)
    assert_same_params(sharded, packed())
    assert sharded.params["layers"][0]["mlp"]["gate"].addressable_shards[0].data.shape == (3, 32, 16)


def test_packed_experts_are_saved_unpacked(tmp_path):
    jaxkv.models.save(tmp_path, packed())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not any(name.endswith(("_blocks", "_scales")) for name in jaxkv.models.Files(tmp_path))
    assert_same_params(jaxkv.models.load(tmp_path), packed())


def test_progress_counts_the_bytes_of_packed_experts():
    seen = []
    jaxkv.models.load(GOLDEN / "mxfp4", progress=lambda done, total: seen.append((done, total)))
    files = jaxkv.models.Files(GOLDEN / "mxfp4")
    assert seen[-1] == (sum(map(files.nbytes, files)),) * 2


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scales", None, r"missing: {}_scales \(3, 64, 2\)"),
        ("scales", lambda x: x[..., :1], r"shape: {}_scales is \(3, 64, 1\) in the file, \(3, 64, 2\) in the model"),
        ("blocks", lambda x: x[:, :, :, ::2], r"shape: {}_blocks is \(3, 64, 2, 8\) in the file, \(3, 64, 2, 16\)"),
        ("scales", lambda x: x.astype(np.float32), r"kind: {}_scales is float32; of MXFP4 it is uint8"),
    ],
)
def test_packed_experts_that_do_not_fit_are_named(part, change, message, changed):
    name = "model.layers.1.mlp.experts.gate_up_proj"

    def spoil(tensors):
        x = tensors.pop(f"{name}_{part}")
        if change is not None:
            tensors[f"{name}_{part}"] = change(x)

    with pytest.raises(ValueError, match=message.format(name.replace(".", r"\."))):
        jaxkv.models.load(changed("mxfp4", spoil))


def test_numbers_of_four_bits_and_their_scales():
    """By the tables of the specification, and for the largest scale by transformers."""
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 1, 16)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    want = np.array([table[nibble] for byte in range(256) for nibble in (byte % 16, byte // 16)]).reshape(16, 32)
    for scale in (0, 1, 100, 127, 200, 252):
        got = mxfp4.unpack(blocks, np.full((1, 16, 1), scale, np.uint8), np.float32)
        assert got.shape == (1, 32, 16)
        np.testing.assert_array_equal(got[0].T, (want * 2.0 ** (scale - 127)).astype(np.float32))
    got = mxfp4.unpack(blocks[:, :1], np.full((1, 1, 1), 255, np.uint8), np.float32)[0, :8, 0]
    assert got.tolist() == [0, 0, 2.0**127, 0, np.inf, 0, np.inf, 0]


@pytest.mark.filterwarnings("default")
def test_transformers_reads_what_was_unpacked(tmp_path):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    jaxkv.models.save(tmp_path, packed())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        got = model(torch.tensor(expected("mxfp4")["tokens"])[None].long()).logits[0].numpy()
    np.testing.assert_allclose(got, expected("mxfp4")["logits"], rtol=0, atol=2e-4)


# DeepSeek in FP8.


def test_weights_in_fp8_are_multiplied_by_the_scales_of_their_blocks_as_by_transformers(tmp_path):
    model = jaxkv.models.load(GOLDEN / "fp8", dtype="float32")
    assert_logits(model, "fp8")
    assert jaxkv.models.load(GOLDEN / "fp8").config.dtype == "bfloat16"  # that of what isn't scaled
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert_same_params(jaxkv.models.load(GOLDEN / "fp8", dtype="float32", sharding=place), model)
    jaxkv.models.save(tmp_path, model)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_params(jaxkv.models.load(tmp_path), model)


def test_blocks_of_fp8_may_reach_over_the_end_of_a_weight(tmp_path):
    """As those of DeepSeek-V3's latents do: 576 rows in blocks of 128."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((2, 7, 9)).astype("float8_e4m3fn")
    scales = random.random((2, 3, 3), dtype=np.float32)
    tensors = {"w": weight, "w_scale_inv": scales, "plain": np.ones(3, np.float32)}
    safetensors.write(tmp_path / "model.safetensors", tensors)
    files = fp8.ScaledFiles(tmp_path, (3, 4))
    assert (sorted(files), len(files)) == (["plain", "w"], 2)
    assert files.nbytes("w") == 2 * 7 * 9 + 2 * 3 * 3 * 4
    rows, columns = np.arange(7) // 3, np.arange(9) // 4
    want = weight.astype(np.float32) * scales[:, rows[:, None], columns]
    np.testing.assert_array_equal(files["w"], want)
    np.testing.assert_array_equal(files["plain"], tensors["plain"])


def test_fp8_that_does_not_fit_is_said(changed):
    name = "model.layers.0.mlp.up_proj.weight"

    def spoil(change):
        return changed("fp8", lambda tensors: tensors.update({f"{name}_scale_inv": change(tensors)}))

    with pytest.raises(ValueError, match=r"up_proj\.weight_scale_inv is \(6, 2\); .* blocks of \(4, 8\) .* \(6, 3\)"):
        jaxkv.models.load(spoil(lambda tensors: tensors[f"{name}_scale_inv"][:, :2]))
    with pytest.raises(ValueError, match=r"up_proj\.weight_scale_inv int8; in FP8 they are float8_e4m3fn and float32"):
        jaxkv.models.load(spoil(lambda tensors: tensors[f"{name}_scale_inv"].astype(np.int8)))
    with pytest.raises(ValueError, match=r"up_proj\.weight is float8_e4m3fn; quantized weights can't be read"):
        jaxkv.models.load(changed("fp8", lambda tensors: tensors.pop(f"{name}_scale_inv")))
    config = json.loads((GOLDEN / "fp8" / "config.json").read_text())
    for block, error, message in (
        (None, jaxkv.NotSupportedError, "null, one scale for a whole weight; only blocks can be read"),
        ([128], ValueError, r"\[128\]; it must be two sizes"),
        ([0, 8], ValueError, r"\[0, 8\]; it must be two sizes"),
        (8, ValueError, "8; it must be two sizes"),
    ):
        quantization = {"quant_method": "fp8", "weight_block_size": block}
        with pytest.raises(error, match=message):
            jaxkv.models.read_config({**config, "quantization_config": quantization})
