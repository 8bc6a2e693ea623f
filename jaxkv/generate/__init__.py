"""Generation: compiled loops over a model that is passed in as a function. Imports no model."""

from jaxkv.generate.loop import Generation as Generation
from jaxkv.generate.loop import Stream as Stream
from jaxkv.generate.loop import generate as generate
from jaxkv.generate.loop import stream as stream
