"""Drover's control plane: schedules moves and conducts them."""

import os

# TLS 1.3 only, in every process of Drover: hostd imports this package as well. gRPC
# for Python has no setting for the least version; what it has is the list of suites
# for TLS 1.2, read when grpc is imported, so it is set here, before that. The one
# suite left needs an RSA certificate, which Drover never issues, so no handshake
# below 1.3 succeeds. (With RSA certificates of your own, TLS 1.2 with it would.)
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES256-GCM-SHA384")
