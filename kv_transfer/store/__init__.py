"""The stand-alone store of KV blocks: `python -m kv_transfer`."""
