"""The pipeline and its launcher. Ctrl-C ends a command without a traceback while it is imported, which takes seconds;
from then on :func:`pipeline.preflight.one_sentence` lets the command meet it."""

import signal
import sys

# "-m" it is while Python looks for the module of "python -m", and only then
_command = sys.argv[:1] == ["-m"] and "pipeline.local" not in sys.orig_argv
# which it is not where Ctrl-C is ignored, as in the background
if _command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
