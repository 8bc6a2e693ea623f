"""Model: what `jaxkv.models.load` returns, from which one call makes texts."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import LayerSpec
from jaxkv.generate import beam_search, best_of
from jaxkv.models.asked import Asked
from jaxkv.models.choices import Choices
from jaxkv.models.completing import key_of, start
from jaxkv.models.completion import Completion, TextStream
from jaxkv.models.generation import GenerationConfig
from jaxkv.models.searching import choose
from jaxkv.nn.nnx import Forward, functional


def abstract(kind: Callable[..., Any], config: Any) -> Any:
    """Returns `kind(config, rngs=...)` with shapes in place of arrays: a module to load parameters into.

    As `nnx.eval_shape` would, in a third of the time: Flax spends most of it on counting random draws while tracing.

    >>> from jaxkv.models import Decoder, DecoderConfig
    >>> module = abstract(Decoder, DecoderConfig(vocab_size=8, width=4, num_layers=1, num_heads=1))
    >>> module.embed.embedding.shape
    (8, 4)
    """
    key = jax.random.key(0)
    return nnx.eval_shape(lambda: kind(config, rngs=types.SimpleNamespace(params=lambda: key)))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as a function and its parameters, and what belongs to it.

    Attributes:
      forward: `forward(params, tokens, positions, cache) -> (logits, cache)`, hashable.
      params: nested dicts of arrays.
      specs: one LayerSpec per layer, for `Cache.init`.
      config: what the module is made of, a DecoderConfig or an EncoderDecoderConfig.
      context: tokens of the longest sequence it was made for; None if nobody says.
      generation: stop tokens, and how its makers want it to be sampled.
      source: the parsed config.json of its checkpoint, empty if there is none.
      notes: decisions of the loader where the files don't agree, a line each.
    """

    forward: Forward
    params: Any = dataclasses.field(repr=False)
    specs: tuple[LayerSpec, ...] = dataclasses.field(repr=False)
    config: Any
    context: int | None = None
    generation: GenerationConfig = GenerationConfig()
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    make_tokenizer: Callable[[], Any] | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, module: Any, **rest: Any) -> Model:
        """Returns the Model of an nnx module that has a `config` and `specs()`.

        Args:
          module: such as a `Decoder`; its arrays are shared.
          **rest: further fields.
        """
        forward, params = functional(module)
        return cls(forward, params, tuple(module.specs()), module.config, **rest)

    @property
    def module(self) -> Any:
        """The nnx module with these params: `model.module(tokens)` gives logits without a cache, and trains."""
        return nnx.merge(self.forward.graphdef, self.params)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Text to tokens and back, see `jaxkv.models.Tokenizer`; read on first use.

        Raises:
          ImportError: without the extra `jaxkv[models]`.
          OSError: if the checkpoint has no tokenizer.json.
        """
        if self.make_tokenizer is None:
            raise FileNotFoundError("this model came without a tokenizer; make one: jaxkv.models.Tokenizer(directory)")
        return self.make_tokenizer()

    def init_cache(self, num_rows: int = 1, capacity: int | None = None, **options: Any) -> Cache:
        """Returns an empty cache for this model.

        Args:
          num_rows: sequences that it holds.
          capacity: tokens that a sequence can hold; None: the model's context length.
          **options: of `jaxkv.Cache.init`, such as `storage=jaxkv.Int8()` or `sharding`.

        Raises:
          ValueError: for invalid sizes, or without a capacity if the model's context length is unknown.

        >>> from jaxkv.models import tiny
        >>> tiny.load().init_cache(num_rows=2).capacity
        512
        """
        capacity = self.context if capacity is None else capacity
        if capacity is None:
            raise ValueError("the model's context length is unknown; give capacity=, in tokens")
        return Cache.init(self.specs, num_rows, capacity, **options)

    def generate(self, prompts: Any = None, **options: Any) -> Completion:
        """Continues texts, answers messages, or goes on from tokens: one prompt or many, all rows together.

        As the checkpoint's makers want it: with their sampler, stop tokens (the tokenizer's own too) and chat template;
        what is given here takes the place of what they say.

        Args:
          prompts: a text, which is continued; a list of messages ({"role": ..., "content": ...}), which are written
            down by the chat template and answered; a list of token numbers; or a list of such prompts, one per row of
            the cache, None for a row that stays idle. An encoder-decoder takes None: as its makers let a text begin.
          max_new_tokens: most tokens per row; one number, or one per row. None: what the checkpoint says, else 256, but
            no more than the model was made for.
          cache: None makes one, of 1,024 tokens or as many as are needed. The Completion of an earlier call goes on
            from it, what `beam_search` or `best_of` found from its best text: what its cache holds is kept.
            Or a Cache: an empty one, or for prompts of tokens one that holds the beginning of each. It is donated.
          sampler: in place of the checkpoint's, see `jaxkv.generate`.
          stop_tokens: in place of the checkpoint's, see `jaxkv.generate`.
          stop_strings: in place of the checkpoint's. A row ends where one of these stands in what was generated, with
            the reason "stop". The text is cut there. (The host looks at the text after each step.)
          seed: a whole number from 0 to 2**32 - 1. Another one gives another text where tokens are drawn. 0 by default:
            the same text each time.
          key: a PRNG key in place of the seed.
          chat: variables for the chat template, such as {"enable_thinking": False}.
          features, feature_lengths: the input of the encoder, as for `EncoderDecoder.encode_into`, one per row.
          language, task: how the text of an encoder-decoder begins, in place of prompts: by the names that its
            checkpoint has, such as language="de", task="translate".
          num_samples: how many texts of each prompt, drawn independently. Each prompt is prefilled once; its texts come
            one after the other. A cache that is given has a row for each.
          speculate: None; "lookup", to draft the next tokens from the text itself; or a small Model with the same
            tokenizer, which drafts them. The tokens are the same, in fewer steps, see `jaxkv.speculate`.
          num_draft: most tokens of a draft.
          **options: arguments of `jaxkv.sampling.sampler`, such as temperature=0.8, each in place of what the
            checkpoint says; None leaves that out. temperature=0 is greedy.

        Returns:
          A Completion: `texts`, `tokens`, `reasons`, `cache` and more, with one entry per prompt; `text` of one.

        Raises:
          ValueError: for arguments that don't fit, before anything is touched.
          TypeError: for the name of an option that there is not.
          CacheError: if the cache was donated before.
          ImportError, OSError: if the checkpoint's tokenizer is needed and can't be read.

        >>> from jaxkv.models import tiny
        >>> result = tiny.load().generate(["Return the ", "A list"], max_new_tokens=8, temperature=0)
        >>> result.texts, result.reasons
        (('number o', ' of all '), ('length', 'length'))
        """
        return self.stream(prompts, **options).run()

    def beam_search(
        self,
        prompts: Any = None,
        *,
        num_beams: int,
        num_return: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        **options: Any,
    ) -> Choices:
        """Returns the most likely continuations of prompts that a beam search finds, see `jaxkv.beam_search`.

        Each prompt is prefilled once. The search obeys the checkpoint's penalties and suppressed tokens, but not its
        settings for sampling and its stop strings.

        Args:
          prompts: as for `generate`.
          num_beams, num_return, length_penalty, early_stopping: see `jaxkv.beam_search`.
          **options: as for `generate`: max_new_tokens, sampler, stop_tokens, chat, features, feature_lengths, language,
            task, and rules of `jaxkv.sampling.sampler`, such as repetition_penalty=1.2. And `cache`: None makes one
            whose rows share a pool of pages; or one of `num_beams` rows for each prompt, as `jaxkv.beam_search` takes
            it, which is donated.

        Raises:
          ValueError, TypeError, CacheError, ImportError, OSError: as `generate` and `jaxkv.beam_search`.

        ```python
        found = model.beam_search(["Return the ", "A list is"], num_beams=4, num_return=2, max_new_tokens=20)
        print(found.texts, found.scores)
        ```
        """
        search = functools.partial(
            beam_search,
            num_beams=num_beams,
            num_return=num_return,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        drawing = dict.fromkeys(("top_k", "top_p", "min_p")) | {"temperature": 0}
        return choose(self, Asked.of(prompts, options, drawing), num_beams, search)

    def best_of(
        self,
        prompts: Any = None,
        *,
        n: int,
        by: str = "mean",
        seed: int = 0,
        key: Any = None,
        **options: Any,
    ) -> Choices:
        """Returns n samples of each prompt, the one that the model finds most likely first, see `jaxkv.best_of`.

        Each prompt is prefilled once. Samples are drawn with the checkpoint's sampler, or at temperature 1 if that is
        greedy. Stop strings are not obeyed.

        Args:
          prompts, seed, key: as for `generate`.
          n, by: see `jaxkv.best_of`.
          **options: as for `generate`: max_new_tokens, sampler, stop_tokens, chat, features, feature_lengths, language,
            task, and arguments of `jaxkv.sampling.sampler`, such as temperature=0.8. And `cache`: None makes one whose
            rows share a pool of pages; or one of n rows for each prompt, as `jaxkv.best_of` takes it, which is donated.

        Raises:
          ValueError, TypeError, CacheError, ImportError, OSError: as `generate` and `jaxkv.best_of`.

        ```python
        found = model.best_of("Return the ", n=8, temperature=0.8, max_new_tokens=20)
        print(found.text)
        more = model.generate("Return the " + found.text + " because", cache=found.best)
        ```
        """
        drawing = {"temperature": 1.0} if self.generation.greedy else {}
        search = functools.partial(best_of, n=n, by=by, key=key_of(seed) if key is None else key)
        return choose(self, Asked.of(prompts, options, drawing), n, search)

    def stream(
        self,
        prompts: Any = None,
        *,
        stop_strings: Any = None,
        seed: int = 0,
        key: Any = None,
        num_samples: int = 1,
        speculate: Any = None,
        num_draft: int = 8,
        **options: Any,
    ) -> TextStream:
        """Returns an iterator over the text that `generate` returns, as it comes: strings, or tuples for many texts.

        For the arguments see `generate`. With `speculate`, a step brings several tokens.

        >>> from jaxkv.models import tiny
        >>> steps = tiny.load().stream("Return the ", max_new_tokens=8, temperature=0)
        >>> "".join(steps), steps.result.reasons
        ('number o', ('length',))
        """
        return start(
            self,
            Asked.of(prompts, options, {}),
            stop_strings=stop_strings,
            seed=seed,
            key=key,
            num_samples=num_samples,
            speculate=speculate,
            num_draft=num_draft,
        )
