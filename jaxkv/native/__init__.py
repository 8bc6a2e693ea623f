"""What XLA's CPU backend calls in C++: the library, where it comes from, and primitives that may be lowered to it."""
