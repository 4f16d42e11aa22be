"""What a broken connection means, in words for the person at the terminal: none of OpenSSL or of the C library."""

from __future__ import annotations

import http.client
import socket
import ssl

_NO_TLS = "what answers there does not speak TLS 1.3; is the port right?"
_ALERTS = {
    "CERTIFICATE_EXPIRED": "it says that the certificate that it was shown has expired",
    "CERTIFICATE_REVOKED": "it says that the certificate that it was shown was revoked",
    "CERTIFICATE_REQUIRED": "it wants a certificate, which only a site that has joined has; is the port right?",
    "UNKNOWN_CA": "it does not know who issued the certificate that it was shown; is it of another federation?",
    "BAD_CERTIFICATE": "it does not accept the certificate that it was shown",
    "CERTIFICATE_UNKNOWN": "it does not accept the certificate that it was shown",
}
"""By how the name of OpenSSL's reason ends: what the other side said of our certificate."""
_MISTRUST = {
    9: "its certificate is not valid yet; is this machine's clock right?",
    10: "its certificate has expired; is this machine's clock right?",
    18: "its certificate is not of this federation",
    19: "its certificate is not of this federation",
    20: "its certificate is not of this federation",
    62: "its certificate is for another name",
    64: "its certificate is for another address",
}
"""By OpenSSL's code (X509_V_ERR_...): why the server's certificate is not trusted."""


def cause(error: BaseException) -> str:
    """Why a connection could not be made, or broke."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(error, socket.gaierror):
        return "that name has no address here"
    if _closed(error):
        return "the connection was closed"
    if isinstance(error, ssl.SSLError):
        return next((said for end, said in _ALERTS.items() if _reason(error).endswith(end)), _NO_TLS)
    if isinstance(error, http.client.HTTPException):
        return "what answers there does not speak HTTP as a server of this version does"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def mistrust(error: ssl.SSLCertVerificationError) -> str:
    """Why the server's certificate is not that of the server that is trusted."""
    return _MISTRUST.get(error.verify_code, str(error.verify_message))


def shut_out(error: BaseException) -> bool:
    """Whether the other side took a connection and ended it unanswered, or said that it wants another certificate."""
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLCertVerificationError):
        return _closed(error) or _reason(error).endswith(tuple(_ALERTS))
    return _closed(error)


def _reason(error: ssl.SSLError) -> str:
    return getattr(error, "reason", None) or ""


def _closed(error: BaseException) -> bool:
    closed = ConnectionResetError | BrokenPipeError | ssl.SSLEOFError | ssl.SSLZeroReturnError
    return isinstance(error, closed | http.client.RemoteDisconnected)
