"""The public names: what type checkers read, and what `__init__.py` imports when it is asked for."""

from . import models as models
from . import testing as testing
from .cache.cache import Cache as Cache
from .cache.export import exportable as exportable
from .cache.layer import Layer as Layer
from .cache.pages import Pages as Pages
from .cache.plan import MemoryPlan as MemoryPlan
from .cache.plan import plan_memory as plan_memory
from .cache.rows import Rows as Rows
from .cache.spec import EMPTY as EMPTY
from .cache.spec import Chunk as Chunk
from .cache.spec import Cross as Cross
from .cache.spec import Full as Full
from .cache.spec import LayerSpec as LayerSpec
from .cache.spec import Window as Window
from .cache.step import Step as Step
from .cache.storage import Dense as Dense
from .errors import CacheError as CacheError
from .errors import CacheFullError as CacheFullError
from .errors import NotSupportedError as NotSupportedError
from .generate import sampling as sampling
from .generate.generation import Generation as Generation
from .generate.reading import prefill as prefill
from .generate.reading import score as score
from .generate.stream import Stream as Stream
from .generate.stream import generate as generate
from .generate.stream import stream as stream
from .memo.memo import Memo as Memo
from .memo.tiers import MemoStats as MemoStats
from .nn import linen as linen
from .nn import nnx as nnx
from .nn.attend import attend as attend
from .nn.buffers import Buffer as Buffer
from .nn.buffers import TransientBuffer as TransientBuffer
from .nn.rotary import LinearScaling as LinearScaling
from .nn.rotary import Llama3Scaling as Llama3Scaling
from .nn.rotary import LongRopeScaling as LongRopeScaling
from .nn.rotary import Rotary as Rotary
from .nn.rotary import YarnScaling as YarnScaling
from .nn.state import Loaded as Loaded
from .nn.state import load_state as load_state
from .nn.state import load_state_dict as load_state_dict
from .nn.state import save_state as save_state
from .nn.state import state_dict as state_dict
from .nn.uncached import cross_attend as cross_attend
from .nn.uncached import self_attend as self_attend
from .offload.offload import Offload as Offload
from .store.current import get_store as get_store
from .store.current import set_store as set_store
from .store.current import use_store as use_store
from .store.ring import Ring as Ring
from .store.stacked import StackedQueue as StackedQueue
from .store.store import Store as Store

__version__: str
__all__: list[str]
