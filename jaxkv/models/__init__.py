"""Models that decode with a cache: a decoder driven by a config, weights in files, and a small trained one."""

from . import tiny as tiny
from .bytes import ByteTokenizer as ByteTokenizer
from .checkpoint import init as init
from .checkpoint import load as load
from .checkpoint import save as save
from .checkpoint import tensor_parallel as tensor_parallel
from .choices import Choices as Choices
from .completion import Completion as Completion
from .completion import TextStream as TextStream
from .config import read_config as read_config
from .decoder import Decoder as Decoder
from .decoder import DecoderConfig as DecoderConfig
from .encoder_decoder import EncoderDecoder as EncoderDecoder
from .encoder_decoder import EncoderDecoderConfig as EncoderDecoderConfig
from .experts import ExpertsConfig as ExpertsConfig
from .families import FAMILIES as FAMILIES
from .files import Files as Files
from .files import fingerprint as fingerprint
from .generation import GenerationConfig as GenerationConfig
from .latent import LatentConfig as LatentConfig
from .mixers import GatedDeltaConfig as GatedDeltaConfig
from .mixers import Mamba2Config as Mamba2Config
from .mixers import ShortConvConfig as ShortConvConfig
from .model import Model as Model
from .template import TemplateLimit as TemplateLimit
from .tokenizer import Tokenizer as Tokenizer
