"""Checkpoints of every family give the logits and the texts that Hugging Face transformers gives.

tests/golden/families/ is what transformers wrote and computed (tests/golden/make_families.py). Where it is installed,
more settings are made anew.
"""

import functools
import importlib.util
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import safetensors
from jaxkv.models import FAMILIES
from jaxkv.nn.leaves import named

GOLDEN = Path(__file__).parent / "golden" / "families"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.name != "whisper")
CAPACITY = 96
# Keys turned by short factors don't fit queries turned by long ones, so a short text of this one is a case of its own.
LONG = {"phi3_long"}
# One for each way that attention looks back: full, windows between full layers with soft caps, learned positions, sinks
# and experts, chunks, layers without rotary embeddings, layers that share, latents.
THOROUGH = ("llama3", "gemma2", "gemma4", "gpt2", "gpt_oss", "llama4", "cohere2", "deepseek_v3")


@functools.cache
def model_of(name):
    return jaxkv.models.load(GOLDEN / name, dtype="float32")


@functools.cache
def expected(name):
    return dict(safetensors.File(GOLDEN / name / "expected.safetensors"))


@functools.partial(jax.jit, static_argnums=0)
def run(forward, params, tokens, positions, cache):
    return forward(params, tokens, positions, cache)


@nnx.jit
def uncached(model, tokens):
    return model(tokens)


def feed(model, rows, block, *, left=False, capacity=CAPACITY):
    """Returns the logits of each row, fed in blocks of a given size, and the cache.

    Shorter rows end with padding, or begin with it.
    """
    cache = jaxkv.Cache.init(model.specs, len(rows), capacity, max_block=24)
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), longest), np.int32)
    positions = np.full((len(rows), longest), jaxkv.EMPTY, np.int32)
    for row, text in enumerate(rows):
        place = slice(longest - len(text), longest) if left else slice(0, len(text))
        tokens[row, place], positions[row, place] = text, np.arange(len(text))
    parts = []
    for begin in range(0, longest, block):
        stretch = slice(begin, begin + block)
        logits, cache = run(model.forward, model.params, tokens[:, stretch], positions[:, stretch], cache)
        parts.append(np.asarray(logits))
    whole = np.concatenate(parts, axis=1)
    return [whole[row][positions[row] >= 0] for row in range(len(rows))], cache


def texts(name):
    facts = expected(name)
    return [facts["tokens"], facts["tokens"][:10] if name in LONG else facts["short"]]


def logits(name):
    facts = expected(name)
    return [facts["logits"], facts["short_logits"]]


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)


# Without XLA's optimizations jaxlib 0.10.2 is 1e-3 off at one token of Gemma 4.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.optimized) if name == "gemma4" else name for name in THOROUGH]
)
def test_logits_without_a_cache(name):
    got = uncached(model_of(name).module, jnp.asarray(expected(name)["tokens"])[None])[0]
    assert_close(got, expected(name)["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_ragged_batch_padded_on_either_side(name):
    model, (first, second) = model_of(name), logits(name)
    # Padding on the left takes the program of padding on the right; blocks between one and all a further one.
    for block, left in [(24, False), (24, True)] + [(8, True)] * (name in THOROUGH):
        got = feed(model, texts(name), block, left=left)[0]
        assert_close(got[0], first)
        if name not in LONG:
            assert_close(got[1], second)


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_each_is_the_best_past_the_window_and_the_original_context(name):
    facts = expected(name)
    rows = [np.concatenate([facts["tokens"], facts["greedy"]]), np.concatenate([facts["short"], facts["short_greedy"]])]
    if name in LONG:
        rows[1] = rows[1][:1]
    got = feed(model_of(name), rows, 1)[0]
    assert_close(got[0][:24], facts["logits"])
    assert got[0].argmax(-1)[23:-1].tolist() == facts["greedy"].tolist()
    if name not in LONG:
        assert_close(got[1][:7], facts["short_logits"])
        assert got[1].argmax(-1)[6:-1].tolist() == facts["short_greedy"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_is_the_row_in_a_batch(name):
    model, (first, second) = model_of(name), texts(name)
    both = feed(model, [first, second], 24)[0]
    np.testing.assert_array_equal(feed(model, [first, []], 24)[0][0], both[0])
    # Padded to the same block, so that the same program runs.
    np.testing.assert_array_equal(feed(model, [np.resize(first, 24), second], 24)[0][1], both[1])


def test_greedy_texts():
    model, facts = model_of("gpt_oss"), expected("gpt_oss")
    cache = jaxkv.Cache.init(model.specs, num_rows=2, capacity=CAPACITY)
    result = jaxkv.generate(model.forward, model.params, [facts["tokens"], facts["short"]], cache, max_new_tokens=64)
    assert result.tokens.tolist() == [facts["greedy"].tolist(), facts["short_greedy"].tolist()]


def test_short_factors_of_longrope_where_sequences_stay_short():
    facts = expected("phi3_long")
    model = jaxkv.models.load(GOLDEN / "phi3_long", dtype="float32", context=16)
    got = feed(model, [np.concatenate([facts["short"], facts["short_greedy"][:9]])], 1)[0][0]
    assert_close(got[:7], facts["short_logits"])
    assert got.argmax(-1)[6:-1].tolist() == facts["short_greedy"][:9].tolist()
    assert model.context == 16 and model_of("phi3_long").context == 128


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_the_checkpoint_is_the_same(name, tmp_path):
    model = model_of(name)
    jaxkv.models.save(tmp_path, model, dtype="bfloat16", max_shard_bytes=10_000)
    before, after = jaxkv.models.Files(GOLDEN / name), jaxkv.models.Files(tmp_path)
    assert set(after) == set(before)
    for tensor in before:
        assert after[tensor].dtype == before[tensor].dtype, tensor
        np.testing.assert_array_equal(after[tensor].view(np.uint8), before[tensor].view(np.uint8), err_msg=tensor)
    files = sorted(path.name for path in tmp_path.glob("model*.safetensors"))
    assert len(files) > 1 and files[0].startswith("model-00001-of-")
    assert jaxkv.models.read_config(tmp_path)[:2] == jaxkv.models.read_config(GOLDEN / name)[:2]


def test_saved_in_one_file_an_old_index_goes(tmp_path):
    model = model_of("gpt2")
    jaxkv.models.save(tmp_path, model, max_shard_bytes=10_000)
    jaxkv.models.save(tmp_path, model)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    again = jaxkv.models.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.config.dtype == "float32"


def test_a_dtype_that_would_quantize_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"dtype=int8: .* give bfloat16, float16 or float32"):
        jaxkv.models.save(tmp_path / "there", model_of("gpt2"), dtype="int8")
    assert not (tmp_path / "there").exists()


def test_untrained_models_are_made_from_a_config_alone_and_saved(tmp_path):
    model = jaxkv.models.init(GOLDEN / "gemma2", rngs=nnx.Rngs(0))
    jaxkv.models.save(tmp_path, model)
    again = jaxkv.models.load(tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), again.params, model.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    model = jaxkv.models.load(GOLDEN / "gemma3", dtype=dtype)
    kinds = {name: leaf.dtype for name, leaf in named(model.params).items()}
    # What is stored as scale - 1 would lose its last bits; all else is as asked.
    assert {str(kind) for name, kind in kinds.items() if "norm" not in name} == {dtype}
    assert {str(kind) for name, kind in kinds.items() if "norm" in name} == {"float32"}
    assert {spec.k_storage.dtype.name for spec in model.specs} == {dtype}
    got = uncached(model.module, jnp.asarray(expected("gemma3")["tokens"])[None])
    assert got.dtype == dtype
    worst = np.abs(np.asarray(got[0], np.float32) - expected("gemma3")["logits"]).max()
    assert worst < {"bfloat16": 0.5, "float16": 0.05}[dtype]


def test_the_dtype_is_that_of_the_checkpoint():
    assert jaxkv.models.load(GOLDEN / "qwen3").config.dtype == "bfloat16"


def test_fused_while_loading_the_logits_are_the_same():
    model = jaxkv.models.load(GOLDEN / "llama3", dtype="float32", fuse=True)
    assert "qkv" in model.params["layers"][0]["attention"]
    got = uncached(model.module, jnp.asarray(expected("llama3")["tokens"])[None])
    assert_close(got[0], expected("llama3")["logits"])
    with pytest.raises(ValueError, match="a fused model can't be saved"):
        jaxkv.models.save(GOLDEN / "nowhere", model)


@pytest.mark.parametrize("name", ["llama3", "gemma2", "phi3", "qwen2_moe"])
def test_sharded_over_two_devices(name):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    model = jaxkv.models.load(GOLDEN / name, dtype="float32", sharding=jaxkv.models.tensor_parallel(mesh))
    query = model.params["layers"][0]["attention"]["query"]["kernel"]
    assert query.addressable_shards[0].data.shape[1] == query.shape[1] // 2
    whole = named(model_of(name).params)
    for param, leaf in named(model.params).items():
        np.testing.assert_array_equal(leaf, whole[param], err_msg=param)
    if name in {"llama3", "phi3"}:  # once loaded they differ from gemma2 in sizes only
        return
    if name == "qwen2_moe":
        assert model.params["layers"][0]["mlp"]["gate"].addressable_shards[0].data.shape == (4, 24, 8)
        got = uncached(model.module, jnp.asarray(expected(name)["tokens"])[None])[0]
        assert_close(got, expected(name)["logits"])
        return
    along_heads = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    cache = jaxkv.Cache.init(model.specs, 1, CAPACITY, sharding=along_heads)
    result = jaxkv.generate(model.forward, model.params, [expected(name)["tokens"]], cache, max_new_tokens=8)
    assert result.tokens[0].tolist() == expected(name)["greedy"][:8].tolist()


def test_one_sharding_for_all():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    model = jaxkv.models.load(GOLDEN / "gpt2", sharding=place)
    assert {leaf.sharding for leaf in jax.tree.leaves(model.params)} == {place}


def test_a_loaded_model_no_longer_depends_on_its_file(tmp_path):
    copy_of("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    shutil.copy(GOLDEN / "gpt2" / "model.safetensors", path)
    model = jaxkv.models.load(tmp_path)
    before = jax.tree.map(np.array, model.params)
    path.write_bytes(bytes(path.stat().st_size))  # the same file, overwritten
    jax.tree.map(np.testing.assert_array_equal, model.params, before)


def test_progress_ends_with_everything():
    seen = []
    jaxkv.models.load(GOLDEN / "phi3", progress=lambda done, total: seen.append((done, total)))
    done, total = zip(*seen, strict=True)
    tensors = jaxkv.models.Files(GOLDEN / "phi3")
    assert set(total) == {sum(tensors[name].nbytes for name in tensors)}
    assert list(done) == sorted(done) and done[-1] == total[-1]


def copy_of(name, folder):
    """Returns a writable copy of a checkpoint, and its tensors."""
    shutil.copy(GOLDEN / name / "config.json", folder)
    return dict(jaxkv.models.Files(GOLDEN / name))


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    tensors = copy_of("qwen3", tmp_path)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 24), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.layers.2.mlp.down_proj.weight"] = np.zeros((24, 40), np.int8)
    safetensors.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError) as error:
        jaxkv.models.load(tmp_path)
    assert str(error.value).splitlines()[1:] == [
        "  shape: model.layers.1.mlp.up_proj.weight is (3, 24) in the file, (40, 24) in the model",
        "  kind: model.layers.2.mlp.down_proj.weight is int8; quantized weights can't be read",
        "  missing: model.norm.weight (24,)",
        "  unknown: model.layers.0.self_attn.q_proj.bias (32,)",
    ]


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_sees_images(prefix, tmp_path):
    tensors = copy_of("gemma3", tmp_path)
    tensors = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"] = np.zeros((2, 2), np.float32)
    tensors["multi_modal_projector.mm_input_projection_weight"] = np.zeros((2, 2), np.float32)
    safetensors.write(tmp_path / "model.safetensors", tensors)
    text = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    got = jaxkv.models.load(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, got.params, model_of("gemma3").params)
    assert got.context == 128
    jaxkv.models.save(tmp_path / "text", got)  # as a model of text alone, which is what it holds
    name, config, _ = jaxkv.models.read_config(tmp_path / "text")
    assert (name, config) == ("gemma3_text", jaxkv.models.read_config(GOLDEN / "gemma3")[1])


def test_llama4_as_it_is_published_with_eyes(tmp_path):
    tensors = {f"language_model.{name}": tensor for name, tensor in copy_of("llama4", tmp_path).items()}
    tensors["vision_model.class_embedding"] = np.zeros(2, np.float32)
    tensors["multi_modal_projector.linear_1.weight"] = np.zeros((2, 2), np.float32)
    safetensors.write(tmp_path / "model.safetensors", tensors)
    text = json.loads((GOLDEN / "llama4" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": text}))
    got = jaxkv.models.load(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, got.params, model_of("llama4").params)
    assert "it is for images" in got.notes[0]


# What transformers has in memory, and `torch.save` of it in files: (pattern of names, replacement).
STACKED = {
    "mixtral": (r"block_sparse_moe\.experts\.(\d+)\.(w1|w3|w2)\.weight", ("w1", "w3"), "mlp"),
    "qwen2_moe": (r"mlp\.experts\.(\d+)\.(\w+)\.weight", ("gate_proj", "up_proj"), "mlp"),
    "qwen3_moe": (r"mlp\.experts\.(\d+)\.(\w+)\.weight", ("gate_proj", "up_proj"), "mlp"),
    "olmoe": (r"mlp\.experts\.(\d+)\.(\w+)\.weight", ("gate_proj", "up_proj"), "mlp"),
    "glm4_moe": (r"mlp\.experts\.(\d+)\.(\w+)\.weight", ("gate_proj", "up_proj"), "mlp"),
}


@pytest.mark.parametrize("name", STACKED)
def test_experts_may_lie_in_two_tensors_as_transformers_has_them_in_memory(name, tmp_path):
    pattern, halves, place = STACKED[name]
    tensors, stacks = {}, {}
    for tensor, array in copy_of(name, tmp_path).items():
        if found := re.search(pattern, tensor):
            before = tensor[: found.start()]
            stacks.setdefault(before, {}).setdefault(found[2], {})[int(found[1])] = array
        else:
            tensors[tensor.replace("block_sparse_moe.gate", "mlp.gate")] = array
    for before, parts in stacks.items():
        gate, up, down = (
            np.stack([parts[part][i] for i in range(len(parts[part]))])
            for part in (*halves, *(set(parts) - set(halves)))
        )
        tensors[f"{before}{place}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{before}{place}.experts.down_proj"] = down
    safetensors.write(tmp_path / "model.safetensors", tensors)
    got = jaxkv.models.load(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, got.params, model_of(name).params)


def test_granite_s_mixture_may_have_the_names_that_transformers_has_in_memory(tmp_path):
    names = {
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.weight": "router.weight",
    }
    tensors = copy_of("granitemoe", tmp_path)
    for old, new in names.items():
        tensors = {name.replace(old, new): array for name, array in tensors.items()}
    safetensors.write(tmp_path / "model.safetensors", tensors)
    got = jaxkv.models.load(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, got.params, model_of("granitemoe").params)


def test_experts_that_are_missing_or_too_many_are_named(tmp_path):
    tensors = copy_of("mixtral", tmp_path)
    expert = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    moved = {
        expert.format(number, part): tensors.pop(expert.format(1, part)) for number, part in ((1, "w1"), (4, "w2"))
    }
    tensors |= {expert.format(4, "w2"): moved[expert.format(4, "w2")], expert.format(1, "w1"): np.zeros((24, 8))}
    safetensors.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError) as error:
        jaxkv.models.load(tmp_path)
    assert str(error.value).splitlines()[1:] == [
        f"  shape: {expert.format(1, 'w1')} is (24, 8) in the file, (24, 24) in the model",
        f"  missing: {expert.format(1, 'w2')} (24, 24)",
        f"  unknown: {expert.format(4, 'w2')} (24, 24)",
    ]


@pytest.mark.parametrize(("name", "layer"), [("glm4_moe", 46), ("deepseek_v3", 61)])
def test_layers_that_predict_further_tokens_are_not_read(name, layer, tmp_path):
    tensors = copy_of(name, tmp_path)
    tensors[f"model.layers.{layer}.eh_proj.weight"] = np.zeros((2, 2), np.float32)
    safetensors.write(tmp_path / "model.safetensors", tensors)
    model = jaxkv.models.load(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, model.params, model_of(name).params)
    assert model.notes == (f"model.layers.{layer}.eh_proj.weight: not read, it predicts further tokens",)


def test_gpt2_as_it_was_first_published(tmp_path):
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in copy_of("gpt2", tmp_path).items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 96, 96), np.float32)
    safetensors.write(tmp_path / "model.safetensors", tensors)
    got = jaxkv.models.load(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, got.params, model_of("gpt2").params)


def test_checkpoints_here_are_small():
    sizes = {folder.name: sum(path.stat().st_size for path in folder.iterdir()) for folder in GOLDEN.iterdir()}
    assert max(sizes.values()) < 100_000, sizes


def test_every_family_has_a_checkpoint_here():
    here = {json.loads((path / "config.json").read_text())["model_type"] for path in GOLDEN.iterdir()}
    assert here == set(FAMILIES) - {"gemma3", "gemma4", "llama4"}  # which are gemma3_text and so on with eyes


@functools.cache
def make_families():
    """Returns the script as a module, or skips where transformers is not installed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("make_families", GOLDEN.parent / "make_families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ODD = [
    "llama with all biases, tied",
    "llama with linear scaling",
    "llama with yarn, one kv head",
    "mistral without a window, tied",
    "qwen2 without windows, tied",
    "qwen3 with biases and windows",
    "gemma2 with biases, untied",
    "gemma3, more layers than the pattern",
    "phi3, a quarter turned, tied",
    "gpt2, another width within, untied",
    "gpt_oss with one expert, without biases",
    "gpt_oss with more experts than tokens",
    "mixtral with a window, one expert for a token, tied",
    "qwen2_moe, every second layer, scores that sum to 1, no biases",
    "qwen3_moe with windows and biases, scores as they are",
    "olmoe with biases, scores that sum to 1",
    "olmo2 with biases, one kv head, tied",
    "smollm3 with windows and biases, untied",
    "cohere with biases, untied",
    "cohere2, layers by default, with biases",
    "llama4 with experts everywhere, one for a token, biases",
    "llama4 with yarn, without chunks and temperature",
    "granite with biases, untied",
    "gemma, untied, with biases",
    "glm4, turned as a whole, no biases, tied",
    "glm4_moe in one group, two shared experts, scores as they are",
    "seed_oss without biases, tied",
    "lfm2, inner width as it is, no biases, untied",
    "granite4 without experts, turned, one group, biases, tied",
    "qwen3_next, layers by default, half of a head turned, biases, tied",
    "exaone4 without windows, tied",
    "ernie4_5 without biases, untied",
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", ODD)
def test_odd_settings_against_transformers(case, tmp_path):
    script = make_families()
    assert set(ODD) == set(script.ODD)
    source, facts = script.make(*script.ODD[case])
    script.write(tmp_path, source, facts)
    facts = safetensors.File(tmp_path / "expected.safetensors")
    model = jaxkv.models.load(tmp_path, dtype="float32")
    for block in (24, 1):
        got = feed(model, [facts["tokens"], facts["short"]], block)[0]
        assert_close(got[0], facts["logits"])
        assert_close(got[1], facts["short_logits"])
    cache = jaxkv.Cache.init(model.specs, num_rows=2, capacity=CAPACITY)
    prompts = [facts["tokens"], facts["short"]]
    result = jaxkv.generate(model.forward, model.params, prompts, cache, max_new_tokens=64)
    assert result.tokens.tolist() == [facts["greedy"].tolist(), facts["short_greedy"].tolist()]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_is_saved(name, tmp_path):
    make_families()
    import torch
    import transformers

    jaxkv.models.save(tmp_path, model_of(name), max_shard_bytes=20_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        got = model(torch.tensor(expected(name)["tokens"])[None].long()).logits[0].numpy()
    assert_close(got, expected(name)["logits"])
