"""The native kernels of jaxkv, `kernels.so`. There is nothing to call here: jaxkv finds and loads it."""
