"""TLS of the data port: both ends show a certificate that the same authority has signed."""

import ssl

from kv_transfer.config import TransferConfig


def server_context(config: TransferConfig) -> ssl.SSLContext | None:
    """For the receiving end; None when the settings name no certificate.

    Raises:
        OSError: a file cannot be read or used.
    """
    return _context(config, ssl.PROTOCOL_TLS_SERVER)


def client_context(config: TransferConfig) -> ssl.SSLContext | None:
    """For the sending end; as `server_context`."""
    return _context(config, ssl.PROTOCOL_TLS_CLIENT)


def _context(config: TransferConfig, protocol: int) -> ssl.SSLContext | None:
    if not config.is_secured:
        return None
    context = ssl.SSLContext(protocol)
    # Workers come and go under any address; the authority, which is the pool's own, vouches.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(config.tls_cert, config.tls_key)
    context.load_verify_locations(config.tls_ca)
    return context
