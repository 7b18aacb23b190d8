"""`python -m gateway`: the public door of a mesh."""

import os
import sys
from dataclasses import replace

from engine.checkpoint.locate import default_cache_dir, locate_model
from engine.checkpoint.model_id import model_id_of
from engine.errors import IsthmusError
from gateway.config import GatewayConfig
from gateway.main import serve
from gateway.session import RecoveryConfig
from gateway.tokenizer import load_text_model
from mesh.logs import set_up_logging
from mesh.process import report_failure, run_service
from mesh.settings import parse_command_line
from mesh.telemetry import OTLP_ENDPOINT_VARIABLE


def main(arguments: list[str]) -> int:
    """Exit status: 0 after a clean stop, 1 when the gateway cannot run as asked."""
    try:
        settings = parse_command_line(
            "gateway",
            "Answers the OpenAI HTTP API and isthmus.v1.Inference with the workers of a mesh.",
            {"gateway": GatewayConfig, "recovery": RecoveryConfig},
            arguments,
            os.environ,
        )
        config: GatewayConfig = settings["gateway"]
        recovery: RecoveryConfig = settings["recovery"]
        set_up_logging("gateway", level=config.log_level, log_format=config.log_format)
        if not config.otlp_endpoint:
            endpoint = os.environ.get(OTLP_ENDPOINT_VARIABLE, "")
            config = replace(config, otlp_endpoint=endpoint)
        path = locate_model(config.model, cache_dir=default_cache_dir(os.environ))
        text_model = load_text_model(path)
    except (IsthmusError, ValueError) as error:
        return report_failure(error)
    model_id = config.model_id or model_id_of(config.model)
    return run_service(serve(config, recovery, model_id=model_id, text_model=text_model))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
