"""jaxkv: functional caches for JAX."""

from .cache.cache import Cache as Cache
from .cache.layer import Layer as Layer
from .cache.plan import MemoryPlan as MemoryPlan
from .cache.plan import plan_memory as plan_memory
from .cache.rows import Rows as Rows
from .cache.spec import EMPTY as EMPTY
from .cache.spec import Chunk as Chunk
from .cache.spec import Full as Full
from .cache.spec import LayerSpec as LayerSpec
from .cache.spec import Window as Window
from .cache.step import Step as Step
from .cache.storage import Dense as Dense
from .errors import CacheError as CacheError
from .errors import CacheFullError as CacheFullError
from .errors import NotSupportedError as NotSupportedError
