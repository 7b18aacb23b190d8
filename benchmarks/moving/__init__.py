"""Moving blocks of memory between two processes of a host, our way and others'."""
