"""vmlab in pytest: machines as fixtures, their faults and deaths as results, and one report.

`plugin` is what pytest loads; everything else here is imported by the first test that asks for a
machine. Tests need no import from here; plan files and other collectors find `machine_run`.
"""
