"""``run.py bench``: any engine folder, in trtexec's figures."""
