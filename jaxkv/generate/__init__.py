"""Generation: compiled loops over a model that is passed in as a function. Imports no model."""

from jaxkv.generate.beams import beam_search as beam_search
from jaxkv.generate.best_of import best_of as best_of
from jaxkv.generate.candidates import Candidates as Candidates
from jaxkv.generate.generation import Generation as Generation
from jaxkv.generate.generation import Speculation as Speculation
from jaxkv.generate.reading import prefill as prefill
from jaxkv.generate.reading import score as score
from jaxkv.generate.speculate import speculate as speculate
from jaxkv.generate.speculate import stream_speculation as stream_speculation
from jaxkv.generate.stream import Stream as Stream
from jaxkv.generate.stream import generate as generate
from jaxkv.generate.stream import stream as stream
