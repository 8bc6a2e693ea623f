"""Samplers: which token comes next, given the logits of one sequence.

A sampler is a frozen, hashable object, so that a compiled loop can hold it as a static fact. The parts compose with `|`
and work from left to right on the logits of one row:

>>> sampler = RepetitionPenalty(1.1) | Temperature(0.8) | TopK(40) | TopP(0.95)

`sampler(...)` makes one from the numbers known everywhere, in the order of Hugging Face transformers; another order is
another distribution, since each part sees only what the parts before it left over.

Any other hashable callable `sample(key, logits) -> token` is a sampler too: it gets one PRNG key and the float32 logits
[V] of one row, and returns an integer scalar; `generate` maps it over the rows. Where `generate` got no key, it gets
None: a sampler that does not read its key needs none.

Logits that are NaN give some token of the vocabulary; `generate` does not take it, and ends that row.
"""

from jaxkv.generate.history import History as History
from jaxkv.generate.sampling.base import Chain as Chain
from jaxkv.generate.sampling.base import Sampler as Sampler
from jaxkv.generate.sampling.choice import Greedy as Greedy
from jaxkv.generate.sampling.choice import MinP as MinP
from jaxkv.generate.sampling.choice import Temperature as Temperature
from jaxkv.generate.sampling.choice import TopK as TopK
from jaxkv.generate.sampling.choice import TopP as TopP
from jaxkv.generate.sampling.named import sampler as sampler
from jaxkv.generate.sampling.penalties import FrequencyPenalty as FrequencyPenalty
from jaxkv.generate.sampling.penalties import NoRepeat as NoRepeat
from jaxkv.generate.sampling.penalties import PresencePenalty as PresencePenalty
from jaxkv.generate.sampling.penalties import RepetitionPenalty as RepetitionPenalty
from jaxkv.generate.sampling.rules import Allow as Allow
from jaxkv.generate.sampling.rules import Force as Force
from jaxkv.generate.sampling.rules import LogitBias as LogitBias
from jaxkv.generate.sampling.rules import Suppress as Suppress
