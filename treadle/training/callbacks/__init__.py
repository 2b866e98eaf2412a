"""Every behaviour around the loop: one callback each."""
