"""What every service shares. Importing it says how gRPC's core is to run in this process.

The core reads these variables once, when `grpc` is imported: in a service `mesh` comes first.
What the operator has set stands.
"""

import os

_GRPC_CORE = {
    # Information about every peer that stops is nothing for the operator's terminal.
    "GRPC_VERBOSITY": "ERROR",
    # Nobody forks without exec here; with it, every child started would stop gRPC's threads.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # Without the event engine a completion queue polls its sockets itself. With it, a message goes
    # through three more threads, and a gateway with one client pays 310 us a token instead of 247.
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
}

for _name, _value in _GRPC_CORE.items():
    os.environ.setdefault(_name, _value)
