"""For tests of caches and of models that decode with one: an oracle, random programs, `assert_cache_correct`."""

from .decoding import WAYS_OF_FEEDING as WAYS_OF_FEEDING
from .decoding import assert_cache_correct as assert_cache_correct
from .oracle import Oracle as Oracle
from .oracle import OracleStep as OracleStep
from .pages import assert_only_written as assert_only_written
from .pages import assert_pages_sound as assert_pages_sound
from .programs import Begin as Begin
from .programs import BeginCross as BeginCross
from .programs import CopyPrefix as CopyPrefix
from .programs import Grow as Grow
from .programs import Keep as Keep
from .programs import Machine as Machine
from .programs import Remove as Remove
from .programs import Reset as Reset
from .programs import Retry as Retry
from .programs import Rewind as Rewind
from .programs import Take as Take
from .programs import random_operation as random_operation
from .programs import run_program as run_program
from .sharing import assert_shared as assert_shared
