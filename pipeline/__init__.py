"""The pipeline and its launcher. While a command is being imported, which takes seconds, Ctrl-C ends it without a
traceback; from then on :func:`pipeline.command.exit_on_error` lets the command handle it."""

import signal
import sys

# argv[0] is "-m" only while Python looks for the module of "python -m"
_command = sys.argv[:1] == ["-m"] and "pipeline.local" not in sys.orig_argv
# it is another handler where Ctrl-C is ignored, as in the background
if _command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
