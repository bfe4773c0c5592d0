"""What the control plane and hostd share besides the generated protos.

Errors, identities, TLS, configuration files and logging. Nothing here knows
of migrations, hosts or libvirt.
"""

import os

# TLS 1.3 only, in both daemons. gRPC for Python has no setting for the least version;
# what it has is the list of suites for TLS 1.2, read when grpc is imported, so it is
# set here: the daemons import this package first. The one suite left needs an RSA
# certificate, which Drover never issues, so no handshake below 1.3 succeeds. (With
# RSA certificates of an authority of your own, TLS 1.2 with this suite would.)
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES256-GCM-SHA384")
