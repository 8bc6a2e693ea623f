"""config.json is read as transformers reads it, and whatever is wrong with it is said before weights are read.

tests/golden/rope_configs.json is what transformers makes of it (tests/golden/make_rope_configs.py).
"""

import dataclasses
import functools
import json
import logging
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import safetensors
from jaxkv.models import FAMILIES, read_config
from jaxkv.models.config import check_layers, context_of
from jaxkv.models.decoder import Block
from jaxkv.models.experts import ExpertsConfig
from jaxkv.models.families.exaone import Pattern
from jaxkv.models.families.fields import ByLayer, Choice, Flag, List, Number, Object
from jaxkv.models.families.granite_hybrid import AutoOr, NoLimit
from jaxkv.models.model import abstract

GOLDEN = Path(__file__).parent / "golden"
ROPE = json.loads((GOLDEN / "rope_configs.json").read_text())["cases"]
CHECKPOINTS = [json.loads((path / "config.json").read_text()) for path in sorted((GOLDEN / "families").iterdir())]

# What Hugging Face has under these names, as config.json was written at the time; the number of parameters is what the
# cards say.
LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "model_type": "llama", "attention_bias": False, "mlp_bias": False}
PUBLISHED = {
    "Llama-2-7b": (
        {
            **LLAMA,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rope_scaling": None,
            "pretraining_tp": 1,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        },
        6_738_415_616,
    ),
    "Llama-3.2-1B": (
        {
            **LLAMA,
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "attention_bias": False,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "gemma-2-2b": (
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
        2_614_341_888,
    ),
    "gemma-3-1b-it": (
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        999_885_952,
    ),
    "Phi-3-mini-128k": (
        {
            "model_type": "phi3",
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            "sliding_window": 262144,
            "attention_bias": False,
            "tie_word_embeddings": False,
        },
        3_821_079_552,
    ),
    "gpt2": (
        {
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
        124_439_808,
    ),
}

PUBLISHED |= json.loads((GOLDEN / "published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_published_number_of_parameters(name):
    source, count = PUBLISHED[name]
    _, config, _ = jaxkv.models.read_config(source)
    # Layers of one kind are made once, which takes a tenth of the time of making all.
    whole = size(jaxkv.models.Decoder, dataclasses.replace(config, num_layers=1))
    blocks = {}
    for i in range(config.num_layers):
        key = config.layer_experts(i), config.layer_qk_norm(i)
        if key not in blocks:
            blocks[key] = size(functools.partial(Block, index=i), config)
        whole += blocks[key] if i else 0
    assert whole == count


def size(kind, config):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract(kind, config))))


def config_of(name, **changes):
    return jaxkv.models.read_config({**PUBLISHED[name][0], **changes})[1]


def test_facts_of_published_configs():
    scaling = config_of("Llama-3.2-1B").layer_rotary(0).scaling
    assert scaling == jaxkv.Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert config_of("Mistral-7B-v0.1").reaches == (jaxkv.Window(4096),)
    assert config_of("Mistral-7B-v0.1", sliding_window=None).reaches == (jaxkv.Full(),)
    assert config_of("Qwen2.5-0.5B").reaches == (jaxkv.Full(),)
    gemma = config_of("gemma-3-1b-it")
    assert [gemma.reach(i).size for i in range(7)] == [512] * 5 + [None, 512]
    assert [gemma.layer_rotary(i).theta for i in (4, 5)] == [10_000.0, 1_000_000.0]
    assert [config_of("gemma-2-2b").reach(i).size for i in range(4)] == [4096, None, 4096, None]
    mixtral, qwen = config_of("Mixtral-8x7B-v0.1"), config_of("Qwen3-30B-A3B")
    assert (mixtral.layer_rotary(0).theta, mixtral.layer_experts(31)) == (1e6, ExpertsConfig(8, 2, 14336))
    assert qwen.layer_experts(0) == ExpertsConfig(128, 8, 768)
    sparse = config_of("Qwen3-30B-A3B", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [i for i in range(6) if sparse.layer_experts(i)] == [1, 5]
    assert config_of("Qwen3-30B-A3B", num_experts=0).experts is None
    windows = config_of("Qwen1.5-MoE-A2.7B", use_sliding_window=True, max_window_layers=3, num_hidden_layers=6)
    assert [windows.reach(i).size for i in range(6)] == [32768, None, 32768, None, None, None]
    olmo = config_of("Olmo-3-1025-7B")
    assert [olmo.reach(i).size for i in range(5)] == [4096, 4096, 4096, None, 4096]
    assert [olmo.layer_rotary(i).scaling is None for i in range(5)] == [True, True, True, False, True]
    assert {config_of("Olmo-3-1025-7B", rope_theta=2e4).layer_rotary(i).theta for i in range(4)} == {2e4}
    for name in ("SmolLM3-3B", "Llama-4-Scout-17B-16E, its text", "c4ai-command-r7b-12-2024"):
        config = config_of(name)
        assert [config.layer_rotary(i) is None for i in range(8)] == [False, False, False, True] * 2
    llama = config_of("Llama-4-Scout-17B-16E, its text")
    assert [llama.reach(i) for i in range(4)] == [jaxkv.Chunk(8192)] * 3 + [jaxkv.Full()]
    assert [llama.layer_qk_norm(i) for i in range(4)] == ["plain"] * 3 + [False]
    assert [llama.layer_temperature(i) for i in range(4)] == [None] * 3 + [jaxkv.QueryTemperature(8192, 0.1)]
    maverick = config_of("Llama-4-Scout-17B-16E, its text", interleave_moe_layer_step=2, use_qk_norm=False)
    assert [maverick.layer_experts(i) is None for i in range(4)] == [True, False] * 2
    # Normalized once they are turned, queries and keys lose YaRN's magnitude again.
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    assert config_of("Llama-4-Scout-17B-16E, its text", rope_scaling=yarn).layer_rotary(0).scaling.magnitude == 1
    assert config_of("granite-3.3-2b-instruct").logit_scale == 1 / 8
    assert config_of("GLM-4-9B-0414").layer_rotary(0) == jaxkv.Rotary(10_000.0, dim=64, interleaved=True)
    long = config_of("Phi-3-mini-128k").layer_rotary(0)
    assert long.scaling.factors == (2.0,) * 48 and long.scaling.magnitude == pytest.approx(1.1902380714238083)


def test_old_and_new_ways_to_write_rotary_mean_the_same():
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0}
    assert config_of("Llama-2-7b", rope_parameters=new) == config_of("Llama-2-7b", **old)
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    old = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert config_of("gemma-3-1b-it", rope_parameters=kinds) == config_of("gemma-3-1b-it", **old)


REFUSED = {
    "unknown family": ("Llama-2-7b", {"model_type": "mamba"}, '"model_type": .mamba.*it knows llama, llama4'),
    "no family": ("Llama-2-7b", {"model_type": ["llama"]}, '"model_type": .*it knows llama, llama4'),
    "activation": ("Llama-2-7b", {"hidden_act": "xielu"}, '"hidden_act" is "xielu".*known are silu'),
    "rotary": (
        "Llama-2-7b",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        '"rope_scaling.type" is "dynamic".*known are default, linear',
    ),
    "quantized": (
        "Llama-2-7b",
        {"quantization_config": {"quant_method": "gptq"}},
        "\"quantization_config\" .'gptq'.*fetch the model in bfloat16",
    ),
    "quantized as another family is": (
        "Llama-2-7b",
        {"quantization_config": {"quant_method": "mxfp4"}},
        "\"quantization_config\" .'mxfp4'",
    ),
    "layer types": (
        "gemma-2-2b",
        {"layer_types": ["linear_attention"] * 26},
        r'"layer_types\[0\]" is "linear_attention".*full_attention',
    ),
    "scores by layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        '"scale_attn_by_inverse_layer_idx" is true, .* only false is',
    ),
    "clipped": ("OLMoE-1B-7B-0924", {"clip_qkv": 8.0}, '"clip_qkv" is 8.0, .* only null is'),
    "windows beside chunks": (
        "Llama-4-Scout-17B-16E, its text",
        {"layer_types": ["sliding_attention"] * 48},
        r'"layer_types\[0\]" is "sliding_attention".*chunked_attention',
    ),
    "both directions": ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "layers apart": ("Mistral-7B-v0.1", {"per_layer_config": {"1": {"sliding_window": None}}}, "per_layer_config"),
    "an odd head": ("Llama-3.2-1B", {"head_dim": 63}, '"head_dim" is 63, .* in pairs, .* makes 63 of the 63'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(case):
    name, changes, message = REFUSED[case]
    with pytest.raises(jaxkv.NotSupportedError, match=f"^config.json .*{message}"):
        read_config({**PUBLISHED[name][0], **changes})


WRONG = {
    "missing": ("Llama-2-7b", {"hidden_size": None}, 'there is no "hidden_size", which a llama model needs'),
    "in quotes": ("Llama-2-7b", {"attention_bias": "false"}, '"attention_bias" is "false"; it must be true or false'),
    "one too many": ("gemma-2-2b", {"layer_types": ["full_attention"]}, '"layer_types" .* one entry for each of 26'),
    "no factor": ("Llama-2-7b", {"rope_scaling": {"type": "linear"}}, '"rope_scaling" .* "linear" needs "factor"'),
    "windows switched off": (
        "Qwen2.5-0.5B",
        {"layer_types": ["sliding_attention"] * 24},
        '"use_sliding_window" is false; it must be true, since "layer_types" has',
    ),
    "not a size": ("Llama-2-7b", {"hidden_size": "wide"}, '"hidden_size" is "wide"; .* whole number from 1'),
    "a broken number": ("Llama-2-7b", {"rms_norm_eps": float("nan")}, '"rms_norm_eps" is NaN; it must be a number'),
    "half a layer": ("Llama-2-7b", {"num_hidden_layers": 2.5}, '"num_hidden_layers" is 2.5'),
    "layers without end": ("Llama-2-7b", {"num_hidden_layers": 10**9}, '"num_hidden_layers" is 1000000000; .* 1024'),
    "heads": ("Llama-3.2-1B", {"num_key_value_heads": 5}, '"num_key_value_heads" is 5; it must divide the 32'),
    "heads of GPT-2": ("gpt2", {"n_head": 5}, '"n_head" is 5; it must divide the 768 in "n_embd"'),
    "no window": ("gemma-2-2b", {"sliding_window": None}, '"sliding_window" is null; it must be a number of tokens'),
    "more experts for a token than there are": (
        "Mixtral-8x7B-v0.1",
        {"num_experts_per_tok": 9},
        '"num_experts_per_tok" is 9; 9 of them is more than the 8 in "num_local_experts"',
    ),
    "groups": ("GLM-4.5-Air", {"n_group": 3}, '"n_group" is 3; it must divide the 128 in "n_routed_experts"'),
    "too few groups": (
        "GLM-4.5-Air",
        {"n_group": 32},
        '"topk_group" is 1; it must be at most the 32 .* with room for the 8 in',
    ),
    "rotary for some layers": (
        "SmolLM3-3B",
        {"no_rope_layers": [1, 0]},
        '"no_rope_layers" is .*; it must have an entry for each of 36 layers',
    ),
    "neither with rotary nor without": ("SmolLM3-3B", {"no_rope_layers": [2] * 36}, r'"no_rope_layers\[0\]" is 2'),
    "windows switched off in SmolLM3": (
        "SmolLM3-3B",
        {"layer_types": ["sliding_attention"] * 36},
        '"use_sliding_window" is false; it must be true',
    ),
    "no chunk": (
        "Llama-4-Scout-17B-16E, its text",
        {"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 48},
        '"attention_chunk_size" is null; it must be a number of tokens',
    ),
    "factors": (
        "Phi-3-mini-128k",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        '"rope_scaling" .* has 1 factors, but 48 pairs',
    ),
    "a number inside": ("Llama-2-7b", {"rope_scaling": {"factor": "2"}}, '"rope_scaling.factor" is "2"; .* from 1'),
    "a text model": ("gemma-3-1b-it", {"text_config": []}, r'"text_config" is \[\]; it must be an object'),
    "quantized somehow": ("gpt2", {"quantization_config": "int8"}, '"quantization_config" is "int8"; .* an object'),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_refused_by_name(case):
    name, changes, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^config.json can't be read as a .* model: {message}"):
        read_config({**PUBLISHED[name][0], **changes})


def test_all_wrong_fields_are_named_at_once_before_weights_are_read(tmp_path):
    changes = {"hidden_size": "wide", "max_position_embeddings": -1, "rope_scaling": {"factor": 0}, "hidden_act": "x"}
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED["Llama-2-7b"][0], **changes}))
    (tmp_path / "model.safetensors").write_bytes(b"not to be looked at")
    with pytest.raises(ValueError) as error:
        jaxkv.models.load(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path / 'config.json'} can't be read as a llama model:"
    assert [line.split()[0] for line in lines[1:-1]] == [f'"{n}"' for n in (
        "hidden_size", "max_position_embeddings", "rope_scaling.factor", "hidden_act"
    )]  # fmt: skip
    assert lines[-1] == "Correct the file, or download it again."


def test_numbers_may_be_written_with_and_without_a_point():
    sizes = {"hidden_size": 4096.0, "num_hidden_layers": 32.0}
    assert config_of("Llama-2-7b", **sizes) == config_of("Llama-2-7b")
    assert config_of("gemma-2-2b", final_logit_softcapping=30) == config_of("gemma-2-2b")
    assert config_of("Llama-2-7b", rms_norm_eps=0).norm_eps == 0


ACCEPTED = {  # what changes nothing
    "Llama-2-7b": [
        {"pretraining_tp": 2},
        {"eos_token_id": 10**6},
        {"attention_bias": None},
        {"mlp_bias": None},
        {"tie_word_embeddings": None},
        {"num_key_value_heads": None},
        {"head_dim": None},
        {"hidden_act": None},
        {"hidden_act": "swish"},
        {"rms_norm_eps": 1e-5, "rope_scaling": {}},
        {"rope_parameters": {}},
        {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
        {"rope_scaling": {"rope_type": None, "type": "default"}},
        {"partial_rotary_factor": None, "rope_theta": None},
        {"attention_dropout": 0.1, "use_cache": False, "initializer_range": None},
        {"quantization_config": None},
        {"per_layer_config": {}},
        {"text_config": {}},
    ],
    "Mistral-7B-v0.1": [{"attention_dropout": 0.5}, {"max_position_embeddings": 4096}, {"layer_types": None}],
    "Qwen2.5-0.5B": [
        {"use_sliding_window": None},
        {"use_sliding_window": False, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": None},
        {"max_window_layers": None, "layer_types": None},
        {"layer_types": ["full_attention"] * 24},
        {"layer_types": ["attention"] * 24},
    ],
    "Qwen3-0.6B": [{"use_sliding_window": None}, {"attention_bias": None}, {"head_dim": None}],
    "gemma-2-2b": [{"hidden_activation": None}, {"attention_bias": None}, {"query_pre_attn_scalar": 256.0}],
    "gemma-3-1b-it": [
        {"sliding_window_pattern": None},
        {"rope_local_base_freq": 1e4},
        {"attention_bias": None},
        {"attn_logit_softcapping": 50.0},  # has no effect in transformers
    ],
    "Phi-3-mini-128k": [{"resid_pdrop": 0.1}, {"attention_bias": True}, {"partial_rotary_factor": 1}],
    "Mixtral-8x7B-v0.1": [{"num_local_experts": None, "num_experts": 8}, {"router_jitter_noise": 0.1}],
    "Qwen3-30B-A3B": [{"max_window_layers": 3}, {"mlp_only_layers": None}, {"num_local_experts": 128}],
    "Qwen1.5-MoE-A2.7B": [{"sliding_window": 0}, {"mlp_only_layers": []}, {"qkv_bias": None}],
    "Llama-4-Scout-17B-16E, its text": [
        {"no_rope_layers": None},
        {"no_rope_layers": [1, 1, 1, 0] * 13},
        {"moe_layers": list(range(48))},
        {"layer_types": None},
        {"floor_scale": 8192.0},
    ],
    "c4ai-command-r7b-12-2024": [{"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8}],
    "gemma-2b": [{"hidden_act": None}, {"hidden_act": "gelu_pytorch_tanh"}],
    "gpt2": [
        {"n_inner": None},
        {"n_ctx": 5, "resid_pdrop": 0.0},
        {"activation_function": "gelu_fast"},
        {"scale_attn_weights": None},
        {"n_embd": None, "hidden_size": 768, "n_head": None, "num_attention_heads": 12},
    ],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_changes_nothing_is_accepted(name):
    for changes in ACCEPTED[name]:
        assert config_of(name, **changes) == config_of(name), changes


def test_a_null_and_a_missing_field_mean_what_they_mean_in_transformers():
    mistral = {k: v for k, v in PUBLISHED["Mistral-7B-v0.1"][0].items() if k not in ("num_key_value_heads",)}
    assert read_config(mistral)[1].num_kv_heads == 8
    assert read_config({**mistral, "num_key_value_heads": None})[1].num_kv_heads == 32
    assert config_of("gemma-2-2b", attn_logit_softcapping=None).attention_softcap is None
    with pytest.raises(ValueError, match='"num_key_value_heads" is 32 by default; it must divide the 14'):
        read_config({k: v for k, v in PUBLISHED["Qwen2.5-0.5B"][0].items() if k != "num_key_value_heads"})


def test_gpt_oss_as_it_is_published_may_be_in_mxfp4():
    source = json.loads((GOLDEN / "families" / "gpt_oss" / "config.json").read_text())
    config = read_config(source)[1]
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    assert read_config({**source, "quantization_config": quantized})[1] == config
    with pytest.raises(jaxkv.NotSupportedError, match=r"'fp8'.*only mxfp4 can; fetch the model in bfloat16"):
        read_config({**source, "quantization_config": {"quant_method": "fp8"}})


@pytest.mark.parametrize("case", [case for case in ROPE if "rotations" in case], ids=lambda case: case["name"])
def test_rotary_embeddings_are_those_of_transformers(case):
    for length in (4, 120):
        config = read_config(case["config"], context=length)[1]
        layers = range(config.num_layers)
        for kind, (*frequencies, factor) in case["rotations"].items():
            layer = next(i for i in layers if kind in ("all", _kind(config.reach(i))))
            rotary = config.layer_rotary(layer)
            got = rotary.frequencies(config.head_dim)
            np.testing.assert_allclose(got, frequencies[length > 32], rtol=2e-6)
            assert (rotary.scaling.magnitude if rotary.scaling else 1.0) == pytest.approx(factor)


def _kind(reach):
    return "full_attention" if reach.size is None else "sliding_attention"


@pytest.mark.parametrize("case", [case for case in ROPE if "refused" in case], ids=lambda case: case["name"])
def test_rotary_embeddings_that_transformers_refuses_are_refused_by_name(case):
    with pytest.raises((ValueError, jaxkv.NotSupportedError), match=r'"rope_(scaling|parameters)" is '):
        read_config(case["config"])


def test_a_theta_that_is_not_used_is_said(caplog):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": yarn}
    with caplog.at_level(logging.WARNING):
        config_of("Qwen3-0.6B", **new)  # has a theta at the top
        assert not caplog.messages
        assert config_of("Qwen3-0.6B", **new, rope_theta=None).layer_rotary(0).theta == 10_000
    assert "rope_theta is 10000, not 1e+06" in caplog.messages[0]


LENGTHS = {
    "as it is": ("Qwen3-0.6B", {}, 40_960),
    "the recipe of Qwen's card": ("Qwen3-0.6B", {"original_max_position_embeddings": 32_768}, 131_072),
    "no original length": ("Qwen2.5-0.5B", {}, 131_072),
    "multiplied already": ("Qwen2.5-0.5B", {"original_max_position_embeddings": 8192}, 32_768),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_yarn_reaches_the_original_length_times_its_factor(case):
    name, more, length = LENGTHS[case]
    yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **more}} if case != "as it is" else {}
    assert context_of({**PUBLISHED[name][0], **yarn}) == length


def test_context_of_every_kind_of_file():
    whole = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    assert context_of(whole) == 131_072
    assert context_of(PUBLISHED["Llama-3.2-1B"][0]) == 131_072  # not 8192 x 32
    assert context_of(PUBLISHED["Phi-3-mini-128k"][0]) == 131_072
    assert context_of(PUBLISHED["gpt2"][0]) == 1024
    assert context_of({**PUBLISHED["gpt2"][0], "n_positions": None, "max_position_embeddings": 64}) == 64
    assert {context_of(source) for source in CHECKPOINTS} == {80, 96, 128}


@pytest.mark.parametrize(
    ("name", "field", "count"),
    [
        ("llama3", "num_hidden_layers", 3),
        ("gpt2", "n_layer", 3),
        ("whisper", "encoder_layers", 2),
        ("whisper", "decoder_layers", 3),
    ],
)
def test_layers_that_the_files_do_not_have_are_never_made(name, field, count, tmp_path):
    source = json.loads((GOLDEN / "families" / name / "config.json").read_text())
    names = list(jaxkv.models.Files(GOLDEN / "families" / name))
    check_layers(source, names)
    for more in (count + 1, 1000):
        with pytest.raises(ValueError, match=f'"{field}" is {more}; the weights have {count} layers'):
            check_layers({**source, field: more}, names)
    if name == "gpt2":  # as its first checkpoints name them
        check_layers(source, [tensor.removeprefix("transformer.") for tensor in names])
    check_layers(source, [f"other.{tensor}" for tensor in names])  # whose names are reported one by one


def test_experts_that_the_files_do_not_have_are_never_made():
    source = json.loads((GOLDEN / "families" / "mixtral" / "config.json").read_text())
    names = list(jaxkv.models.Files(GOLDEN / "families" / "mixtral"))
    check_layers(source, names)
    with pytest.raises(ValueError, match='"num_local_experts" is 16384; the weights have 4 experts'):
        check_layers({**source, "num_local_experts": 16384}, names)


def test_loading_compares_the_layers_first(tmp_path):
    source = json.loads((GOLDEN / "families" / "llama2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**source, "num_hidden_layers": 1000}))
    safetensors.write(tmp_path / "model.safetensors", dict(jaxkv.models.Files(GOLDEN / "families" / "llama2")))
    with pytest.raises(ValueError, match='"num_hidden_layers" is 1000; the weights have 3 layers'):
        jaxkv.models.load(tmp_path)


HOSTILE = [
    None, "", "x", "false", True, False, -1, 0, 0.5, 3, 2**63, 10**30, -(10**400), 1e309, float("nan"), [], {}, [None],
    [[]], ["x"], [0] * 3, {"x": None}, {"x": {"x": []}}, {"factor": "x"}, {"rope_type": []}, {"rope_type": "yarn"},
    {"rope_type": "yarn", "factor": 1e308}, {"rope_type": "linear", "factor": float("nan")}, {"type": "llama3"},
    {"full_attention": 1}, {"full_attention": {"rope_type": "yarn", "factor": -1}},
    {"rope_theta": 1, "rope_type": "yarn"}, {"rope_theta": -1}, {"quant_method": []}, {"quant_method": "gptq"},
]  # fmt: skip
KINDS = "yarn", "linear", "longrope", "llama3", "default"
FULL = bool(os.environ.get("JAXKV_FULL"))
MINIMAL = {source["model_type"]: source for source in CHECKPOINTS}
for _whole in ("gemma3", "llama4"):
    MINIMAL[_whole] = {"model_type": _whole, "text_config": MINIMAL[f"{_whole}_text"]}


def _inner(kind):
    """Returns the kinds of what an object has."""
    return kind.kinds if isinstance(kind, Object) else {}


def outcome(source, name):
    """Reads a config; returns it, or None if it is refused with the name of the field."""
    try:
        read = read_config(source)
        assert context_of(source) > 0
        return read
    except (ValueError, jaxkv.NotSupportedError) as error:
        said = str(error)
    assert name in said
    return None


@pytest.mark.parametrize("model", MINIMAL)
def test_no_value_of_any_field_gives_anything_but_an_error_that_names_it(model):
    source = MINIMAL[model]
    family = FAMILIES[source["model_type"]]
    part = source.get("text_config")
    small = {}  # one value of each field is enough: a module is the most of the time
    for name, field in {**family.fields, "text_config": None, "quantization_config": None, "model_type": None}.items():
        for i, value in enumerate(HOSTILE):
            inner = part is not None and name in family.fields
            tried = {**source, "text_config": {**part, name: value}} if inner else {**source, name: value}
            read = outcome(tried, name)
            if read is not None:
                small[name, FULL and i] = read[0], read[1]
        for i, key in enumerate(_inner(field.kind) if field else ()):
            for j, value in enumerate(HOSTILE):  # every key of a rope meets every kind and every value
                for kind in KINDS if FULL else [KINDS[(i + j) % len(KINDS)]]:
                    outcome({**source, name: {"rope_type": kind, key: value}}, name)
    for name, config in set(small.values()):
        if all(size < 5000 for size in vars(config).values() if type(size) is int):
            one = {"num_layers": 1, "shares": None} if FAMILIES[name].module is jaxkv.models.Decoder else {}
            abstract(FAMILIES[name].module, dataclasses.replace(config, **one))


def test_every_declared_kind_says_what_is_possible():
    kinds = {type(field.kind) for family in FAMILIES.values() for field in family.fields.values()}
    assert kinds == {Number, Flag, Choice, List, Object, ByLayer, AutoOr, NoLimit, Pattern}
