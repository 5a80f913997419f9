"""Every change of the manager's: queued, journalled, carried out, recovered after a crash.

`handler.py` is what a kind of change is made of, `journal.py` what it writes down, `operator.py`
who takes requests and has them carried out.
"""
