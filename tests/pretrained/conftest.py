"""Under CI a missing extra is an error: without it the files that need transformers would be skipped."""

import os

if os.environ.get("CI"):
    import peft  # noqa: F401
    import transformers  # noqa: F401
