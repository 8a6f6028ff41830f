"""How the WSGI peers are served: what Rollcall's own file sets that matters for speed."""

import os

bind = f"127.0.0.1:{os.environ['PORT']}"
keepalive = 5
timeout = 60
control_socket_disable = True
