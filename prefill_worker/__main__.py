"""`python -m prefill_worker`: one prefill worker."""

from engine.config import CollectivesConfig, EngineConfig
from kv_transfer.config import TransferConfig
from mesh.process import end_process
from mesh.worker_main import Serve, worker_main


def load_serve() -> Serve:
    from prefill_worker.main import serve

    return serve


if __name__ == "__main__":
    end_process(
        worker_main(
            "prefill",
            {
                "engine": EngineConfig,
                "transfer": TransferConfig,
                "collectives": CollectivesConfig,
            },
            load_serve,
        )
    )
