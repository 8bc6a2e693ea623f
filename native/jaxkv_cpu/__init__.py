"""The native attention kernel of jaxkv, `attention.so`. There is nothing to call here: jaxkv finds and loads it."""
