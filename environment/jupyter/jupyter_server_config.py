"""Settings of the lab's server, found through JUPYTER_CONFIG_PATH: `make lab` and the image set it.

A person's own ~/.jupyter still applies to whatever is not set here, and the command line overrides
both. There is no token in here on purpose: Jupyter draws a new one at each start.
"""

import logging
import os
import re
from pathlib import Path

c = get_config()


def one_address(record: logging.LogRecord) -> bool:
    """Jupyter greets with a file and every spelling of its address; a person needs one that works."""
    addresses = re.findall(r"http\S+token=\S+", record.getMessage())
    if addresses:
        record.msg, record.args = f"\n\n    The lab is at {addresses[-1]}\n", ()
    return True


# The image's entry script sets MEMLIB_WORK: there the notebooks are a person's copies.
c.ServerApp.root_dir = os.environ.get("MEMLIB_WORK") or str(Path(__file__).resolve().parents[2])
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.allow_root = hasattr(os, "geteuid") and os.geteuid() == 0
c.LabApp.default_url = "/lab/tree/notebooks/00_start_here.ipynb"

# The terminal shows the address, and after it only what went wrong.
c.Application.log_level = "WARN"
logging.getLogger("ServerApp").addFilter(one_address)
# Jupyter's timeout is three of its intervals, and has to be longer than one: it looks for an answer
# before it sends the next ping. Tornado, which is given the same two numbers, warns that it is.
logging.getLogger("tornado.general").addFilter(lambda r: "websocket_ping_timeout" not in r.getMessage())
# One Ctrl-C stops the lab; notebooks save themselves.
c.ServerApp.answer_yes = True

# The packages come from the lock, so the page offers neither extensions nor updates nor news.
c.LabApp.extension_manager = "readonly"
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.news_url = None

# "python3" is this environment's Python, whatever kernels the person has installed elsewhere.
c.KernelSpecManager.ensure_native_kernel = True
# Otherwise each kernel warns that what it sends to this server is in plain text.
c.KernelManager.transport_encryption = "auto"

# Kernels inherit the environment. Two torch threads on two busy cores can be ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
