"""Named values and queues as a pytree: what steps of imperative code hand on to one another, without a global."""
