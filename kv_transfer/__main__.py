"""`python -m kv_transfer`: one store of KV blocks."""

from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from kv_transfer.store.config import StoreConfig
from mesh.process import end_process
from mesh.worker_main import Serve, worker_main


def load_serve() -> Serve:
    from kv_transfer.store.main import serve

    return serve


if __name__ == "__main__":
    end_process(
        worker_main(
            "store",
            {"store": StoreConfig, "transfer": TransferConfig, "engine": EngineConfig},
            load_serve,
            program="kv_transfer",
            description=(
                "A store of KV blocks for the workers of one model. Of the engine's settings it"
                " reads those that decide the layout: dtype, kv_dtype and block_size_tokens."
            ),
        )
    )
