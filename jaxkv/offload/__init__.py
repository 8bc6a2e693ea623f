"""Activations of many batches, off the accelerator; `jaxkv.Offload` is what users see."""
