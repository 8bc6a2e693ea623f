"""Models that decode with a cache: a decoder driven by a config, weights in files, and a small trained one."""

from . import tiny as tiny
from . import weights as weights
from .decoder import Decoder as Decoder
from .decoder import DecoderConfig as DecoderConfig
from .generation import GenerationConfig as GenerationConfig
from .model import Model as Model
