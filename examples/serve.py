"""Continuous batching: a loop that decodes many requests at once, and lets each begin and end at its own time.

    python examples/serve.py
    python examples/serve.py --rows 8 --pages 64 --new-tokens 40

Requests arrive while others are being decoded. Each gets a row; what an earlier row holds of its prompt is shared, not
prefilled again; long prompts are prefilled in blocks, beside rows that decode. The pool of pages is small on purpose:
when it runs out, an ended row is forgotten, or the shortest request waits. At the end every text is compared with the
one that `jaxkv.generate` writes for its prompt alone.
"""

import argparse
import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv.models import tiny


# The request and its row.
@dataclasses.dataclass
class Request:
    prompt: list[int]
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)  # prompt and answer so far
    done: int = 0  # how many of them the cache holds
    shared: int = 0  # how many of them another row had prefilled

    @property
    def ended(self):
        new = self.tokens[len(self.prompt) :]
        return len(new) >= self.max_new_tokens or new[-1:] in [[token] for token in self.stop_tokens]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def advance(forward, params, tokens, positions, cache):
    """Returns the most likely next token of each row, int32 [R], and the cache. Rows with no position take no part."""
    logits, cache = forward(params, tokens, positions, cache)
    last = jnp.maximum((positions >= 0).sum(1) - 1, 0)
    return jnp.take_along_axis(logits, last[:, None, None], 1)[:, 0].argmax(-1).astype(jnp.int32), cache


copy_prefix = jax.jit(jaxkv.Cache.copy_prefix, donate_argnums=0)
reset = jax.jit(jaxkv.Cache.reset, donate_argnums=0)
retry = jax.jit(jaxkv.Cache.retry, donate_argnums=0)


# The loop.
class Server:
    """Rows of one cache, and the requests that wait for one. `step` is one pass of the model over all rows."""

    def __init__(self, model, rows, capacity, pages, page_size=16, block=32):
        self.model, self.block = model, block
        layout = jaxkv.Pages(num_pages=pages, page_size=page_size)
        self.cache = model.init_cache(rows, capacity, max_block=block, layout=layout)
        self.waiting = collections.deque()
        self.rows = [None] * rows  # the request of each row, also after it has ended: others may share its prefix
        self.steps = 0

    def submit(self, prompt, max_new_tokens):
        if len(prompt) + max_new_tokens > self.cache.capacity:
            raise ValueError(f"{len(prompt)} + {max_new_tokens} tokens, but a row holds {self.cache.capacity}")
        request = Request(prompt, max_new_tokens, self.model.generation.stop_tokens, list(prompt))
        self.waiting.append(request)
        return request

    def running(self):
        return [row for row, request in enumerate(self.rows) if request and not request.ended]

    def admit(self):
        """Gives waiting requests a free row each, with what any row holds of their prompt."""
        while self.waiting and (free := sorted(set(range(len(self.rows))) - set(self.running()))):
            request = self.waiting.popleft()
            shared = [common(request, other) for other in self.rows]
            source = int(np.argmax(shared))
            row = source if source in free else min(free, key=lambda row: shared[row])
            self.cache = copy_prefix(self.cache, source, row, shared[source])  # within one row: truncates it
            self.rows[row] = request
            request.done = request.shared = int(np.asarray(self.cache.lengths)[row])  # where it landed

    def step(self):
        """Feeds each running row its next tokens: a block of its prompt, or the token that it chose last."""
        self.admit()
        running = self.running()
        longest = max((len(self.rows[row].tokens) - self.rows[row].done for row in running), default=0)
        width = 1 if longest <= 1 else self.block  # two programs in all
        tokens = np.zeros((len(self.rows), width), np.int32)
        positions = np.full((len(self.rows), width), jaxkv.EMPTY, np.int32)
        for row in running:
            request = self.rows[row]
            new = request.tokens[request.done : request.done + width]
            tokens[row, : len(new)] = new
            positions[row, : len(new)] = request.done + np.arange(len(new))
        chosen, self.cache = advance(self.model.forward, self.model.params, tokens, positions, self.cache)
        chosen, fits = jax.device_get((chosen, self.cache.ok))
        for row in running:
            request = self.rows[row]
            if fits[row]:
                request.done += int((positions[row] >= 0).sum())
                if request.done == len(request.tokens):
                    request.tokens.append(int(chosen[row]))
        if not fits.all():
            self.make_room(~fits)
        self.steps += 1

    # When the pool is empty.
    def make_room(self, refused):
        """Forgets a row that has ended. If there is none, the shortest running one waits, and is prefilled again."""
        ended = [row for row, request in enumerate(self.rows) if request and request.ended]
        running = self.running()
        if not ended and len(running) == 1:
            raise RuntimeError("the pool of pages is too small for one request; give more pages")
        row = ended[0] if ended else min(running, key=lambda row: self.rows[row].done)
        if not ended:
            self.rows[row].done = 0  # its tokens so far become its prompt
            self.waiting.appendleft(self.rows[row])
        self.rows[row] = None
        self.cache = retry(reset(self.cache, np.arange(len(self.rows)) == row), refused)


def common(request, other):
    """Returns how many first tokens of a request another one's row holds; the last token is always fed."""
    if other is None:
        return 0
    most = min(len(request.tokens) - 1, other.done)
    same = (a == b for a, b in zip(request.tokens[:most], other.tokens, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), most)


# Requests that arrive over time.
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4, help="requests that are decoded at once (default 4)")
    parser.add_argument("--pages", type=int, default=24, help="pages of 16 tokens in the pool (default 24)")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens of each answer (default 24)")
    arguments = parser.parse_args()

    model = tiny.load()
    system = "The following functions are built into the interpreter: "
    texts = [system + word for word in ("abs", "all", "len", "map", "open", "print")] + [
        "A list is",
        "The with statement",
    ]
    server = Server(model, arguments.rows, capacity=160, pages=arguments.pages)
    requests = []
    while len(requests) < len(texts) or server.waiting or server.running():
        if server.steps % 4 == 0 and len(requests) < len(texts):  # one arrives every four steps
            requests.append(server.submit(model.tokenizer.encode(texts[len(requests)]), arguments.new_tokens))
        server.step()

    for text, request in zip(texts, requests, strict=True):
        answer = model.tokenizer.decode(request.tokens[len(request.prompt) :])
        print(f"{request.shared:3} of {len(request.prompt):3} tokens shared   {text[-18:]!r} -> {answer!r}")
    alone = []
    for request in requests:
        cache = model.init_cache(1, 160)
        options = {"max_new_tokens": arguments.new_tokens, "stop_tokens": request.stop_tokens}
        result = jaxkv.generate(model.forward, model.params, [request.prompt], cache, **options)
        alone.append([*request.prompt, *result.tokens[0].tolist()])
    print(f"{server.steps} steps; the same texts as one by one: {alone == [request.tokens for request in requests]}")


if __name__ == "__main__":
    main()
