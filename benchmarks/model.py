"""A whole model: milliseconds per token of jaxkv, transformers (torch) and llama.cpp at three contexts.

The model has the shape of a small Llama: 12 layers of width 768, 12 query and 4 kv heads of 64, a gated MLP of 2,048,
a vocabulary of 32,000 and a head of its own (untied): 125 M parameters, float32, random. `--family` gives the other
families of jaxkv.models the same sizes; Whisper hears 30 seconds first, which its "prefill" includes. Every contestant
loads the same checkpoint, gets the same prompt and decodes greedily, and their tokens are compared, so that all are
seen to compute the same thing.

    python benchmarks/model.py                                            # a table
    python benchmarks/model.py --out docs/data/model.json                 # the same, kept, with docs/figures/model.png
    python benchmarks/model.py --plot docs/data/model.json                # only draws the figure again
    python benchmarks/model.py --family all --out docs/data/families.json # every family against transformers
    python benchmarks/model.py --rows 8 --out docs/data/model_rows.json   # eight sequences, each with its own text

Each contestant lives in a process of its own, loaded once and bound to the same cores; one works at a time, and they
take turns: in every round each decodes `--tokens` tokens from the same context. Medians over the rounds are compared,
so a slow minute of the machine meets all of them. What is not installed is left out, and the output says so.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import logging
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
import traceback
from typing import Any

import numpy as np
from common import about, in_turn, medians, say, warn_if_busy

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEED = 0


@dataclasses.dataclass(frozen=True)
class Shape:
    """The model and the lengths at which it is timed."""

    family: str = "llama"
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    num_kv_heads: int = 4
    head_dim: int = 64
    mlp_dim: int = 2048
    vocab_size: int = 32_000
    window: int = 512
    capacity: int = 4096
    max_block: int = 512
    contexts: tuple[int, ...] = (32, 1024, 4000)
    prefill: int = 1024

    @classmethod
    def of(cls, family: str, shape: Shape) -> Shape:
        """The shape for another family: Whisper's texts are shorter."""
        if family != "whisper":
            return dataclasses.replace(shape, family=family)
        capacity = min(shape.capacity, 448)
        contexts = (min(shape.contexts), capacity * 3 // 4)
        return dataclasses.replace(shape, family=family, capacity=capacity, contexts=contexts, prefill=4)

    def config(self) -> dict[str, Any]:
        """What stands in config.json."""
        if self.family == "whisper":
            halves = {
                f"{half}_{name}": size
                for half in ("encoder", "decoder")
                for name, size in (
                    ("layers", self.num_layers // 2),
                    ("attention_heads", self.num_heads),
                    ("ffn_dim", 4 * self.width),
                )
            }
            return {
                **halves,
                "model_type": "whisper",
                "architectures": ["WhisperForConditionalGeneration"],
                "vocab_size": self.vocab_size,
                "d_model": self.width,
                "num_mel_bins": 80,
                "max_source_positions": 1500,
                "max_target_positions": self.capacity,
                **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 0),
            }
        if self.family == "gpt2":
            sizes = {"n_embd": self.width, "n_layer": self.num_layers, "n_head": self.num_heads}
            return {
                **sizes,
                "model_type": "gpt2",
                "architectures": ["GPT2LMHeadModel"],
                "vocab_size": self.vocab_size,
                "n_positions": self.capacity,
            }
        return {
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.capacity,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": self.family.startswith("gemma"),
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
            **self.of_family(),
        }

    def of_family(self) -> dict[str, Any]:
        if self.family.startswith("gemma"):
            return {"sliding_window": self.window, "query_pre_attn_scalar": self.head_dim}
        if self.family == "gpt_oss":  # half of the experts are read for a token, as much as the others' MLP
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": self.mlp_dim // 2}
            return {**experts, "sliding_window": self.window, "rope_scaling": {"rope_type": "default"}}
        return {"sliding_window": self.window if self.family == "mistral" else None}


TINY = Shape("llama", 2, 64, 4, 2, 16, 128, 256, 16, capacity=64, max_block=16, contexts=(8, 40), prefill=32)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "whisper")
EAGER = ("gemma2", "gpt_oss")  # transformers computes soft caps and sinks in its plain attention only


def write_checkpoint(shape: Shape, folder: str) -> None:
    """Writes random float32 weights as transformers would.

    The scale keeps the stream near 1 and makes attention sharp enough to matter: with small weights every model would
    repeat one token, and comparing tokens would prove nothing.
    """
    import jax
    from flax import nnx

    import jaxkv

    rng = np.random.default_rng(SEED)
    model = jaxkv.models.init(shape.config(), rngs=nnx.Rngs(SEED))
    tied = model.config.tied

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = jaxkv.nn.leaves.name_of(path)
        noise = rng.standard_normal(leaf.shape, dtype=np.float32)
        if name.endswith("norm.scale"):
            return 1 + np.float32(0.1) * noise
        if name.endswith("embedding"):
            return noise * np.float32(0.3 if tied else 1.0)
        if leaf.ndim == 1 or name.endswith("bias"):
            return np.float32(0.1) * noise
        inputs = np.prod(leaf.shape[:-1]) if ".out." in name or ".conv" in name else leaf.shape[0]
        if leaf.ndim == 3 and ".mlp." in name:  # experts
            inputs = leaf.shape[1]
        gain = 2.0 if any(part in name for part in (".query.", ".key.", ".value.")) else 1.0
        return noise * np.float32(gain / inputs**0.5)

    params = jax.tree_util.tree_map_with_path(draw, model.params)
    jaxkv.models.save(folder, dataclasses.replace(model, params=params))


def features(rows: int) -> np.ndarray:
    """Log-mel frames of 30 seconds, [rows, 3000, 80], of nothing."""
    return np.random.default_rng(SEED).standard_normal((rows, 3000, 80), dtype=np.float32)


def read_bytes(folder: str, rows: int, context: int) -> int:
    """Bytes that a decode step can't do without: weights but for unused rows of tables and experts, and the contexts.

    Rows are taken to choose the same experts.
    """
    from flax import nnx

    import jaxkv

    files = jaxkv.models.Files(folder)
    _, config, _ = jaxkv.models.read_config(folder)
    weights = 0
    for name in files:
        size = 4 * int(np.prod(files.shape(name)))
        if (("embed_tokens" in name or "wte" in name) and not config.tied) or "wpe" in name:
            size = 4 * config.width * rows
        if ".experts." in name:
            experts = config.layer_experts(int(name.split(".layers.")[1].split(".")[0]))
            size = size * experts.per_token // experts.num_experts
        weights += size
    module = nnx.eval_shape(lambda: jaxkv.models.Decoder(config, rngs=nnx.Rngs(0)))
    held = 0
    for spec in module.specs():
        if isinstance(reach := spec.reach, jaxkv.Recurrent):
            held += sum(int(np.prod(part)) for part in (reach.tail, reach.state) if part)
        else:
            held += 2 * spec.num_kv_heads * spec.head_dim * min(context, reach.size or context)
    return weights + 4 * held * rows


# The contestants. Histories are tokens [rows, length]. `hold` brings the cache to all but the last token of each row,
# `decode` reads that last token and goes on greedily, then puts the cache back to where it was; `prefill` starts from
# nothing and ends when the token after each row is known. The last two return seconds and the tokens of each row.


class Jaxkv:
    """`jaxkv.models.load`, the weights laid out for decoding, in the compiled loop of jaxkv.generate."""

    packages = ("jax", "jaxlib", "flax")

    def __init__(self, shape: Shape, folder: str, threads: int, rows: int):
        import jax
        import jax.numpy as jnp

        import jaxkv

        self.generate = jaxkv.generate
        model = jaxkv.models.load(folder, dtype="float32", fuse=True)
        self.forward, self.params = model.forward, model.params
        self.cache = jaxkv.Cache.init(model.specs, rows, shape.capacity, max_block=shape.max_block)
        self.encode, self.rows = None, rows
        if shape.family == "whisper":
            from flax import nnx

            graph = self.forward.graphdef
            self.encode = jax.jit(
                lambda params, cache, frames: nnx.merge(graph, params).encode_into(cache, frames), donate_argnums=1
            )
            self.listen()
        self.rewind = jax.jit(lambda cache, lengths: cache.rewind(lengths), donate_argnums=0)
        self.device = f"{jax.default_backend()}: {jax.devices()[0].device_kind}"
        self.jnp, self.jax, self.held = jnp, jax, 0

    def back_to(self, length: int) -> None:
        self.cache = self.jax.block_until_ready(self.rewind(self.cache, self.jnp.full(self.rows, length, "int32")))
        self.held = length

    def listen(self) -> float:
        """Seconds of hearing, where there is something to hear."""
        start = time.perf_counter()
        if self.encode is not None:
            import jax

            self.cache = jax.block_until_ready(self.encode(self.params, self.cache, features(self.rows)))
        return time.perf_counter() - start

    def run(self, history: np.ndarray, count: int) -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        result = self.generate(self.forward, self.params, list(history), self.cache, max_new_tokens=count)
        tokens = np.asarray(result.tokens).tolist()
        seconds = time.perf_counter() - start
        self.cache = result.cache
        return seconds, tokens

    def hold(self, history):
        self.run(history, 1)
        self.back_to(history.shape[1] - 1)

    def decode(self, history, count):
        seconds, tokens = self.run(history, count)
        self.back_to(history.shape[1] - 1)
        return seconds, tokens

    def prefill(self, history):
        self.back_to(0)
        listened = self.listen()
        seconds, tokens = self.run(history, 1)
        self.back_to(0)
        return listened + seconds, tokens


class Transformers:
    """AutoModelForCausalLM on torch in a plain loop, which is quicker than its own `generate`."""

    packages = ("torch", "transformers")
    static = False

    def __init__(self, shape: Shape, folder: str, threads: int, rows: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        attention = "eager" if shape.family in EAGER else "sdpa"
        self.hears = shape.family == "whisper"
        kind = transformers.AutoModelForSpeechSeq2Seq if self.hears else transformers.AutoModelForCausalLM
        self.model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        self.model.eval().to(self.device)
        self.torch, self.transformers, self.shape, self.rows = torch, transformers, shape, rows

    def empty(self) -> None:
        self.cache, self.held = self.new_cache(self.shape.capacity), 0
        if self.hears:
            self.cache = self.transformers.EncoderDecoderCache(self.cache, self.new_cache(1500))

    def new_cache(self, capacity: int) -> Any:
        kind = self.transformers.StaticCache if self.static else self.transformers.DynamicCache
        return kind(config=self.model.config, **({"max_cache_len": capacity} if self.static else {}))

    def listen(self) -> float:
        """Seconds of hearing, where there is something to hear."""
        start = time.perf_counter()
        if self.hears:
            frames = self.torch.from_numpy(features(self.rows)).to(self.device).swapaxes(1, 2)
            with self.torch.inference_mode():
                self.heard = self.model.get_encoder()(frames)
        return time.perf_counter() - start

    def hold(self, history):
        self.empty()
        self.listen()
        self.run(history[:, :-1], 1)
        self.kept = self.cache  # its window layers can't go back, so each turn works on a copy

    def decode(self, history, count):
        self.cache, self.held = copy.deepcopy(self.kept), history.shape[1] - 1
        return self.run(history, count)

    def prefill(self, history):
        self.empty()
        listened = self.listen()
        seconds, tokens = self.run(history, 1)
        return listened + seconds, tokens

    def run(self, history: np.ndarray, count: int) -> tuple[float, list[list[int]]]:
        torch, tokens = self.torch, []
        start = time.perf_counter()
        new = torch.from_numpy(history[:, self.held :]).to(self.device)
        with torch.inference_mode():
            for _ in range(count):
                if self.hears:
                    out = self.model(encoder_outputs=self.heard, decoder_input_ids=new, past_key_values=self.cache)
                else:
                    out = self.model(input_ids=new, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                new = out.logits[:, -1:].argmax(-1)
                tokens.append(new)
        tokens = torch.cat(tokens, 1).tolist()
        return time.perf_counter() - start, tokens


class TransformersStatic(Transformers):
    static = True


class LlamaCpp:
    """llama.cpp through the C functions of llama-cpp-python, whose own class has one sequence.

    The cache is in float32 like the others' (its default is float16), and no row shares anything with another, for
    which llama.h advises `kv_unified=False`.
    """

    packages = ("llama-cpp-python", "gguf")

    def __init__(self, shape: Shape, folder: str, threads: int, rows: int):
        import gguf
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it takes warnings for errors
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_mmap, model_params.n_gpu_layers = False, 0
        with tempfile.TemporaryDirectory() as other:
            path = f"{other}/model.gguf"
            write_gguf(gguf, path, shape, folder)
            model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_ctx, params.kv_unified = rows, rows * shape.capacity, False
        params.n_batch = params.n_ubatch = shape.max_block
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = model and llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError("llama.cpp could not load the model")
        self.batch = llama_cpp.llama_batch_init(shape.max_block, 0, 1)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size, self.most, self.held = shape.vocab_size, shape.max_block, 0
        self.api, self.device = llama_cpp, "cpu"

    def back_to(self, length: int) -> None:
        if not self.api.llama_memory_seq_rm(self.memory, -1, length, -1):
            raise RuntimeError(f"llama.cpp could not go back to {length} tokens")
        self.held = length

    def read(self, tokens: np.ndarray, first_row: int) -> list[int]:
        """Reads tokens [rows, n] behind what is held, in one call. Returns each row's next token."""
        batch, count = self.batch, tokens.shape[1]
        batch.n_tokens = tokens.size
        for i, token in enumerate(tokens.flat):
            row, at = divmod(i, count)
            batch.token[i], batch.pos[i], batch.logits[i] = token, self.held + at, at == count - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, first_row + row
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (len(tokens), self.vocab_size))
        return logits.argmax(-1).tolist()

    def step(self, new: np.ndarray) -> list[int]:
        """Reads tokens [rows, n], in one call as many rows as fit. Returns each row's next token."""
        for at in range(0, new.shape[1], self.most):
            block, following = new[:, at : at + self.most], []
            together = self.most // block.shape[1]
            for row in range(0, len(new), together):
                following += self.read(block[row : row + together], row)
            self.held += block.shape[1]
        return following

    def run(self, history: np.ndarray, count: int) -> tuple[float, list[list[int]]]:
        start, steps = time.perf_counter(), []
        new = history[:, self.held :]
        for _ in range(count):
            steps.append(self.step(new))
            new = np.array(steps[-1])[:, None]
        return time.perf_counter() - start, np.transpose(steps).tolist()

    def listen(self) -> float:
        return 0.0

    hold, decode, prefill = Jaxkv.hold, Jaxkv.decode, Jaxkv.prefill


class PlainRead:
    """Not a model: reads the same bytes once, by `jnp.sum`, and nothing else. What no decode step can beat."""

    packages = ("jax",)

    def __init__(self, shape: Shape, folder: str, threads: int, rows: int):
        import jax
        import jax.numpy as jnp

        self.folder, self.rows, self.device = folder, rows, "the same as jaxkv"
        self.sums = jax.jit(lambda parts: [part.sum() for part in parts])
        self.ones, self.jax = jnp.ones, jax
        self.parts: list[Any] = []

    def hold(self, history):
        size = read_bytes(self.folder, self.rows, history.shape[1] - 1) // 4
        self.parts = [self.ones(max(size // 8, 1), "float32") for _ in range(8)]
        self.decode(history, 1)

    def decode(self, history, count):
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self.jax.block_until_ready(self.sums(self.parts))
            times.append(time.perf_counter() - start)
        return min(times) * count, None

    def prefill(self, history):
        return None, None


CONTESTANTS = {
    "jaxkv": Jaxkv,
    "llama.cpp": LlamaCpp,
    "transformers DynamicCache": Transformers,
    "transformers StaticCache": TransformersStatic,
    "plain read": PlainRead,
}
CURES = {
    Jaxkv: "pip install -e .",
    PlainRead: "pip install -e .",
    LlamaCpp: "pip install llama-cpp-python gguf  (compiles C++ for some minutes; CMAKE_ARGS=-DGGML_NATIVE=ON)",
    Transformers: "pip install torch transformers",
    TransformersStatic: "pip install torch transformers",
}


def write_gguf(gguf: Any, path: str, shape: Shape, folder: str) -> None:
    """Writes a Llama as llama.cpp wants it: what rotates together stands side by side, not half a head apart."""
    import jaxkv

    config = shape.config()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.capacity)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.mlp_dim)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("none")
    names = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    inside = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for i in range(shape.num_layers):
        names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for theirs, ours in inside.items()}
    for name, weight in jaxkv.models.Files(folder).items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = weight.reshape(-1, 2, shape.head_dim // 2, shape.width)  # [heads, half, pair, D]
            weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def work(name: str, shape: Shape, folder: str, threads: int, rows: int, pipe: Any) -> None:
    """The life of a worker: load, say so, answer calls until the pipe closes."""
    sys.path.insert(0, str(ROOT))  # a checkout that is not installed
    kind = CONTESTANTS[name]
    try:
        contestant = kind(shape, folder, threads, rows)
        versions = {package: importlib.metadata.version(package) for package in kind.packages}
        pipe.send({"device": contestant.device, "versions": versions})
    except ModuleNotFoundError as error:
        pipe.send({"left_out": f"{error.name} is not installed; {CURES[kind]}"})
        return
    while True:
        try:
            method, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(contestant, method)(*arguments))
        except Exception:  # noqa: BLE001 (the other contestants go on)
            pipe.send(RuntimeError(traceback.format_exc()))
            return


class Worker:
    def __init__(self, name: str, shape: Shape, folder: str, threads: int, rows: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, shape, folder, threads, rows, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        try:
            result = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the worker ended with exit code {self.process.exitcode}") from None
        if isinstance(result, Exception):
            raise result
        return result

    def __call__(self, *message: Any) -> Any:
        self.pipe.send(message)
        return self.answer()

    def close(self) -> None:
        self.pipe.close()
        self.process.join(5)


def measure(shape: Shape, names: list[str], **settings: int) -> dict[str, Any]:
    """Runs all contestants on one model and returns what `--out` writes."""
    with tempfile.TemporaryDirectory() as folder:
        say(f"writing a random {shape.family}")
        write_checkpoint(shape, folder)
        return measure_checkpoint(shape, folder, names, **settings)


def measure_checkpoint(
    shape: Shape, folder: str, names: list[str], *, rounds: int, tokens: int, threads: int, rows: int = 1
) -> dict[str, Any]:
    import jaxkv

    files = jaxkv.models.Files(folder)
    parameters = sum(int(np.prod(files.shape(name))) for name in files)
    prompt = np.random.default_rng(SEED + 1).integers(0, shape.vocab_size, (rows, shape.capacity), dtype=np.int64)
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}
    versions: dict[str, str] = {}
    devices: dict[str, str] = {}
    facts = about(())
    for name in names:
        say(f"loading {name}")
        worker = Worker(name, shape, folder, threads, rows)
        hello = worker.answer()
        if "left_out" in hello:
            left_out[name] = hello["left_out"]
            say(f"left out: {name}: {left_out[name]}")
        else:
            workers[name], devices[name] = worker, hello["device"]
            versions |= hello["versions"]
    present = list(workers)

    def call(name, *message):
        try:
            return workers[name](*message)
        except RuntimeError as error:
            workers.pop(name).close()
            present.remove(name)
            left_out[name] = f"failed: {str(error).strip().splitlines()[-1]}"
            say(f"{name} failed and is left out from here on:\n{error}")
            return None, None

    decode: dict[int, dict[str, list[float]]] = {}
    continuations: dict[int, dict[str, list[list[int]]]] = {}
    for length in shape.contexts:
        history = prompt[:, : length + 1]
        decode[length] = {name: [] for name in present}
        continuations[length] = {}
        for name in list(present):
            say(f"{name}: reading {length} tokens")
            call(name, "hold", history)
        for name in list(present):
            call(name, "decode", history, tokens)  # compiles, or touches memory first
        for turn in range(rounds):
            say(f"decoding at {length}: round {turn + 1} of {rounds}")
            for name in in_turn(list(present), turn):
                seconds, out = call(name, "decode", history, tokens)
                if seconds is not None:
                    decode[length][name].append(1e3 * seconds / (tokens * rows))
                if out is not None:
                    continuations[length][name] = out
    prefill: dict[str, list[float]] = {name: [] for name in present}
    first: dict[str, list[list[int]]] = {}
    for turn in range(-1, max(rounds // 2, 1)):  # the first one compiles
        say(f"prefill: round {turn + 1} of {max(rounds // 2, 1)}")
        for name in in_turn(list(present), turn):
            seconds, out = call(name, "prefill", prompt[:, : shape.prefill + 1])
            if turn >= 0 and seconds is not None:
                prefill[name].append(1e3 * seconds)
                first[name] = out
    for worker in workers.values():
        worker.close()
    say("")
    return {
        "date": facts["date"],
        "device": facts["device"] | {"of_each": devices},
        "versions": facts["versions"] | versions,
        "model": dataclasses.asdict(shape) | {"parameters": parameters, "dtype": "float32"},
        "settings": {"rounds": rounds, "tokens": tokens, "threads": threads, "rows": rows},
        "decode_ms_per_token": {str(n): {k: v for k, v in by.items() if v} for n, by in decode.items()},
        "prefill_ms": {name: times for name, times in prefill.items() if times},
        "tokens": {str(n): by for n, by in continuations.items()} | {"prefill": first},
        "left_out": left_out,
    }


def agreement(data: dict[str, Any]) -> dict[str, str]:
    """Per contestant, how many of its tokens are those of the first: '32/32 at 32, 32/32 at 1024, ...'.

    A row's tokens count until the first that is another.
    """
    lines: dict[str, str] = {}
    for at, by_name in data["tokens"].items():
        first, *others = by_name
        ours = np.array(by_name[first])
        for name in others:
            differ = np.array(by_name[name]) != ours
            same = int((~np.logical_or.accumulate(differ, axis=1)).sum())
            lines[name] = (lines[name] + ", " if name in lines else "") + f"{same}/{ours.size} at {at}"
    return lines


def table(data: dict[str, Any]) -> str:
    """The medians as text, each peer with its ratio to jaxkv."""
    columns = {f"decode at {n}": by for n, by in data["decode_ms_per_token"].items()}
    columns[f"prefill {data['model']['prefill']}"] = data["prefill_ms"]
    middle = {column: medians(by) for column, by in columns.items()}
    names = list(dict.fromkeys(name for by in middle.values() for name in by))
    lines = [" " * 28 + "".join(f"{column:>20}" for column in columns)]
    for name in names:
        line = f"{name:28}"
        for by in middle.values():
            ratio = f" {by[name] / by['jaxkv']:5.2f}x" if name in by and "jaxkv" in by else ""
            line += f"{f'{by[name]:.1f}{ratio}' if name in by else '-':>20}"
        lines.append(line)
    lines.append("medians in ms (decode: per token); x: times jaxkv's")
    if (rows := data["settings"]["rows"]) > 1:
        lines[-1] += f"; {rows} rows: a token of any row, the prompts of all"
        for column, by in list(middle.items())[:-1]:
            speeds = ", ".join(f"{name} {1e3 / ms:.0f}" for name, ms in by.items())
            lines.append(f"tokens per second, {column}: {speeds}")
    lines += [f"same tokens as {names[0]}: {name}: {same}" for name, same in agreement(data).items()]
    lines += [f"left out: {name}: {why}" for name, why in data["left_out"].items()]
    return "\n".join(lines)


def plot(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws decode time at each context and prefill time beside it."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    decode = {n: medians(by) for n, by in data["decode_ms_per_token"].items()}
    prefill = medians(data["prefill_ms"])
    contexts, rows = list(decode), data["settings"].get("rows", 1)
    names = list(decode[contexts[0]])
    colors = {name: f"C{i}" for i, name in enumerate(names)} | {"plain read": "0.6"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 1), layout="constrained")
    wide = 0.85 / len(names)
    for i, name in enumerate(names):
        at = [c for c, n in enumerate(contexts) if name in decode[n]]
        heights = [decode[contexts[c]][name] for c in at]
        label = "weights and cache read once" if name == "plain read" else name
        places = [c + (i - len(names) / 2 + 0.5) * wide for c in at]
        bars = left.bar(places, heights, wide, color=colors[name], label=label)
        left.bar_label(bars, fmt="%.1f", fontsize=8)
    left.set_xticks(range(len(contexts)), [f"{int(n):,}" for n in contexts])
    left.set(xlabel="tokens of context", ylabel="ms per token", title="Decoding")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(names))
    bars = right.bar(range(len(prefill)), list(prefill.values()), color=[colors[name] for name in prefill])
    right.bar_label(bars, fmt="%.0f", fontsize=8)
    right.set_xticks([])
    right.set(ylabel="ms", title=f"{'Prompt' if rows == 1 else 'Prompts'} of {data['model']['prefill']:,} tokens")
    millions = data["model"]["parameters"] / 1e6
    sequences = "one sequence" if rows == 1 else f"{rows} sequences"
    title = f"{data['model']['family']}, {millions:.0f} M parameters, float32, {sequences}, {data['device']['cpu']}"
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="write the times as JSON, and draw the figure")
    parser.add_argument("--plot", type=pathlib.Path, metavar="JSON", help="only draw the figure of this file")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=f"of: {', '.join(CONTESTANTS)}")
    parser.add_argument(
        "--family", nargs="+", default=["llama"], metavar="NAME", help=f"all, or of: {', '.join(FAMILIES)}"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant at each context (default 9)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded per turn (default 32)")
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default 2)")
    parser.add_argument("--rows", type=int, default=1, help="sequences decoded at once (default 1)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: shows that the script runs")
    arguments = parser.parse_args(argv)
    if arguments.plot:
        plot(json.loads(arguments.plot.read_text()), figure_path(arguments.plot))
        return 0
    families = list(FAMILIES) if arguments.family == ["all"] else arguments.family
    if not set(families) <= set(FAMILIES):
        parser.error(f"--family {' '.join(families)}: known are {', '.join(FAMILIES)}")
    shape, rounds, tokens = (TINY, 2, 8) if arguments.quick else (Shape(), arguments.rounds, arguments.tokens)
    if max(shape.contexts) + 1 + tokens > shape.capacity:
        parser.error(f"--tokens {tokens} do not fit behind {max(shape.contexts)} in a capacity of {shape.capacity}")
    if not 1 <= arguments.rows <= shape.max_block:  # llama.cpp reads a token of each in one block
        parser.error(f"--rows {arguments.rows}: from 1 to {shape.max_block}")
    threads = arguments.threads
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < threads:
            parser.error(f"--threads {threads}, but this process may use {len(cores)} cores")
        os.sched_setaffinity(0, cores[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    all_data, failed = {}, False
    for family in families:
        absent = {"llama": (), "whisper": ("llama.cpp", "plain read")}.get(family, ("llama.cpp",))
        names = [name for name in arguments.only or CONTESTANTS if name not in absent]
        one = Shape.of(family, shape)
        data = all_data[family] = measure(
            one, names, rounds=rounds, tokens=tokens, threads=threads, rows=arguments.rows
        )
        print(f"{family}, {data['model']['parameters'] / 1e6:.0f} M parameters\n{table(data)}\n")
        failed |= any(why.startswith("failed") for why in data["left_out"].values())
        if family == families[0]:
            warn_if_busy(data)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        kept = data if len(families) == 1 else all_data
        arguments.out.write_text(json.dumps(kept, indent=1) + "\n")
        if len(families) == 1:
            try:
                plot(data, figure_path(arguments.out))
            except ModuleNotFoundError:
                print("no figure: matplotlib is not installed; pip install matplotlib")
    return 1 if failed else 0


def figure_path(data_path: pathlib.Path) -> pathlib.Path:
    """docs/data/model.json is drawn in docs/figures/model.png, x/model.json in x/model.png."""
    folder = data_path.parent.parent / "figures" if data_path.parent.name == "data" else data_path.parent
    return folder / f"{data_path.stem}.png"


if __name__ == "__main__":
    raise SystemExit(main())
