"""A beam search of one's own, compiled as one program, from `copy_prefix` and `take`: to be changed as you like.

    python examples/beam_search.py
    python examples/beam_search.py "A list is" --beams 8 --new-tokens 40

The prompt is prefilled into one row and forked; at each step every row goes on from the beam that it now belongs to. On
pages both move integers only. `jaxkv.beam_search` also knows stop tokens, length penalties, rules and many prompts.
"""

import argparse
import functools

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.models import tiny


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=3)
def search(forward, params, prompt, cache, beams, new_tokens):
    """Returns texts int32 [beams, new_tokens], best first, their log-probabilities [beams], and the cache."""
    logits, cache = forward(params, prompt[None], jnp.arange(prompt.size)[None], cache)  # a batch of one is row 0
    for row in range(1, beams):
        cache = cache.copy_prefix(0, row, prompt.size)
    scores, tokens = jax.lax.top_k(jax.nn.log_softmax(logits[0, -1]), beams)
    texts = jnp.zeros((beams, new_tokens), jnp.int32).at[:, 0].set(tokens)

    def step(i, carry):
        texts, scores, cache = carry
        positions = jnp.full((beams, 1), prompt.size + i - 1)
        logits, cache = forward(params, texts[:, i - 1, None], positions, cache)
        scores, best = jax.lax.top_k((scores[:, None] + jax.nn.log_softmax(logits[:, 0])).ravel(), beams)
        parents, tokens = best // logits.shape[-1], best % logits.shape[-1]
        return texts[parents].at[:, i].set(tokens), scores, cache.take(parents)

    return jax.lax.fori_loop(1, new_tokens, step, (texts, scores, cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="The with statement")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=24)
    args = parser.parse_args()
    model = tiny.load()
    prompt, options = model.tokenizer.encode(args.prompt), dict(layout=jaxkv.Pages(64), capacity=512)
    given, cache = (model.forward, model.params), model.init_cache(args.beams, **options)
    texts, scores, _ = search(*given, jnp.array(prompt), cache, args.beams, args.new_tokens)
    for text, score in zip(texts, scores, strict=True):
        print(f"{score:8.3f}  {args.prompt}{model.tokenizer.decode(text)!r}")
    asked = dict(num_beams=args.beams, num_return=args.beams, max_new_tokens=args.new_tokens, length_penalty=0)
    found = jaxkv.beam_search(*given, [prompt], model.init_cache(args.beams, **options), **asked)
    print("the same texts as jaxkv.beam_search:", bool((found.tokens[0] == texts).all()))


if __name__ == "__main__":
    main()
