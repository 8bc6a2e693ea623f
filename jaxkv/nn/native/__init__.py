"""Attention of a decode step in C++, called by XLA's CPU backend: the kernel, its library, and the call from JAX."""
